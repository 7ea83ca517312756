"""What a clip has before and after its denoising: the text encoder and the VAE, measured by themselves.

Each is built with random weights, run once to warm up and once timed, and freed, so that a card that does not hold the
whole pipeline at once still measures all of it. Every rank runs them whole, as diffusers does.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter

import torch

from hcms.clip import ClipShape
from hcms_lab.measure.launch import Rank
from hcms_lab.measure.timing import synchronize
from hcms_lab.measure.wan import build
from hcms_lab.measure.wan.clip_job import ClipJob


def ends_ms(rank: Rank, clip_job: ClipJob) -> list[dict[str, float]]:
    """ms of `text_encoder`, `vae_encode` and `vae_decode` of each clip; nothing of them is left in memory.

    The text encoder's is the pipeline's `encode_prompt`, of both prompts where there is guidance. The VAE encodes only
    where a clip starts from a picture.
    """
    text_ms = _text_ms(rank, clip_job)
    freed(rank.device)
    found = [{"text_encoder": text_ms, **vae} for vae in _vae_ms(rank, clip_job)]
    freed(rank.device)
    return found


def freed(device: torch.device) -> None:
    """Give what nothing holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _text_ms(rank: Rank, clip_job: ClipJob) -> float:
    from diffusers import WanPipeline
    from transformers import ByT5Tokenizer

    model, job = clip_job.model, clip_job.job
    pipe = WanPipeline(
        tokenizer=ByT5Tokenizer(),  # pyright: ignore[reportArgumentType]
        text_encoder=build.random_text_encoder(model, rank.device, job.seed),  # pyright: ignore[reportArgumentType]
        vae=None,  # pyright: ignore[reportArgumentType]
        scheduler=build.scheduler(model),
    )
    return _timed_ms(
        rank,
        lambda: pipe.encode_prompt(
            clip_job.prompt,
            clip_job.negative_prompt,
            do_classifier_free_guidance=model.guidance > 1,
            max_sequence_length=model.text_tokens,
            device=rank.device,
        ),
    )


def _vae_ms(rank: Rank, clip_job: ClipJob) -> list[dict[str, float]]:
    model, job = clip_job.model, clip_job.job
    vae: build.Pipeline = build.random_vae(model, rank.device, job.seed)
    if clip_job.vae_tiling:
        vae.enable_tiling()
    found = []
    for clip in clip_job.clips:
        latents = torch.randn(latents_size(clip, int(vae.config.z_dim)), device=rank.device, dtype=vae.dtype)
        ms = {"vae_encode": 0.0, "vae_decode": _timed_ms(rank, lambda x=latents: vae.decode(x, return_dict=False))}
        if model.task == "i2v":
            size = (1, 3, clip.frames, clip.height, clip.width)
            pixels = torch.zeros(size, device=rank.device, dtype=vae.dtype)  # all but a first frame are nothing anyway
            ms["vae_encode"] = _timed_ms(rank, lambda x=pixels: vae.encode(x))
        found.append(ms)
    return found


def latents_size(clip: ClipShape, channels: int) -> tuple[int, int, int, int, int]:
    """`[1, channels, latent frames, rows, columns]`."""
    s = clip.strides
    return (1, channels, clip.latent_frames, clip.height // s.spatial, clip.width // s.spatial)


def _timed_ms(rank: Rank, call: Callable[[], object]) -> float:
    call()
    synchronize(rank.device)
    began_s = perf_counter()
    call()
    synchronize(rank.device)
    return (perf_counter() - began_s) * 1e3
