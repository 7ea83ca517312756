"""One denoising step of a full-size expert on one device, with random weights, broken down: no ranks, no exchange."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hcms.clip import ClipShape, Strides, layer_flops
from hcms.diffusers import attach, restore
from hcms.kernels import kernel as kernel_named
from hcms_lab.ground.model_config import ModelConfig
from hcms_lab.ground.paths import ROOT
from hcms_lab.ground.records import Record
from hcms_lab.measure.wan.breakdown import DENOISING, Breakdown
from hcms_lab.measure.wan.build import materialize, transformer_on_meta

CONF = ROOT / "conf"
FRAMES = (33, 61)
WARMUP, FORWARDS = 1, 3


@dataclass(kw_only=True)
class StepRecord(Record):
    """One forward of one expert; a denoising step is `forwards_a_step` of them. `<part>_ms` are medians."""

    weights: str = "random"
    num_frames: int
    layers: int
    forwards_a_step: int
    step_ms: float | None = None
    self_attention_ms: float | None = None
    self_projections_ms: float | None = None
    cross_attention_ms: float | None = None
    feed_forward_ms: float | None = None
    transformer_rest_ms: float | None = None
    self_attention_share: float | None = None  # of the forward
    tflops: float | None = None  # of the whole forward
    attention_tflops: float | None = None
    gbps: float | None = None
    share_of_best: float | None = None


def model_config(name: str) -> ModelConfig:
    """A model of conf/model/, without the rest of an experiment's configuration.

    Raises:
        ValueError: no such file; the message lists those that there are.
    """
    known = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
    if name not in known:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(known)}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return ModelConfig(**OmegaConf.to_container(compose(f"model/{name}").model))  # pyright: ignore[reportCallIssue]


def one_gpu_steps(
    hardware: str,
    model_name: str = "wan2.2-t2v-a14b",
    all_frames: tuple[int, ...] = FRAMES,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    *,
    kernels: tuple[str, ...] = ("sdpa", "sdpa-cudnn"),
    height: int | None = None,
    width: int | None = None,
) -> Iterator[StepRecord]:
    """Build one expert with random weights and time a forward of it, part by part; records come while they are made.

    Args:
        hardware: goes into the records.
        model_name: a file of conf/model/.
        all_frames: video frames of each length, 4n + 1.
        device, dtype: of the expert.
        kernels: local attention to try, one record each: torch's choice, and cuDNN's, which is faster on Hopper.
        height, width: in pixels; None is the model's own.
    """
    device = torch.device(device)
    model = model_config(model_name)
    model.dtype = str(dtype).removeprefix("torch.")
    expert = materialize(transformer_on_meta(model), device, seed=0)
    for frames in all_frames:
        clip = ClipShape(frames, height or model.height, width or model.width, Strides.of(model.transformer, model.vae))
        for name in kernels:
            yield _timed(model, expert, clip, device, dtype, hardware, name)


@torch.inference_mode()
def _timed(
    model: ModelConfig,
    expert: Any,
    clip: ClipShape,
    device: torch.device,
    dtype: torch.dtype,
    hardware: str,
    kernel_name: str,
) -> StepRecord:
    heads, head_dim, layers = (
        int(model.transformer[k]) for k in ("num_attention_heads", "attention_head_dim", "num_layers")
    )
    record = StepRecord(
        exp="gpu-one",
        hardware=hardware,
        workload=model.name,
        world_size=1,
        method="denoising-forward",
        kernel=kernel_name,
        dtype=model.dtype,
        batch=1,
        seq_len=clip.tokens,
        heads=heads,
        head_dim=head_dim,
        frames=clip.latent_frames,
        num_frames=clip.frames,
        layers=layers,
        warmup=WARMUP,
        forwards_a_step=2 if model.guidance > 1 else 1,
    )
    attention = kernel_named(kernel_name)
    if refusal := attention.refusal(dtype, head_dim, device.type):
        record.status, record.error = "refused", refusal
        return record
    s = clip.strides
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    in_channels = int(model.transformer["in_channels"])
    inputs = {
        "hidden_states": noise(1, in_channels, clip.latent_frames, clip.height // s.spatial, clip.width // s.spatial),
        "encoder_hidden_states": noise(1, model.text_tokens, int(model.transformer["text_dim"])),
        "timestep": torch.full((1, clip.tokens) if model.expand_timesteps else (1,), 900, device=device),
        "return_dict": False,
    }
    breakdown = Breakdown(device)
    totals, parts = [], []
    finite = True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    attach(expert, breakdown.attention(attention.attend), None)
    try:
        for index in range(WARMUP + FORWARDS):
            breakdown.clear()
            with breakdown.watching(transformers=[expert]), breakdown.clip():
                out = expert(**inputs)[0]
            finite &= bool(out.isfinite().all())
            if index >= WARMUP:
                totals.append(breakdown.total_ms)
                parts.append(breakdown.parts())
    finally:
        restore(expert)
    if device.type == "cuda":
        record.peak_mem_gib = torch.cuda.max_memory_allocated(device) / 2**30
    flops = layer_flops(clip.tokens, model.text_tokens, heads * head_dim, int(model.transformer["ffn_dim"]))
    record.latency_ms, record.times_ms, record.n = median(totals), totals, len(totals)
    record.step_ms = record.latency_ms * record.forwards_a_step
    for part in DENOISING[:-1]:
        setattr(record, f"{part}_ms", median(p[part] for p in parts))
    assert record.self_attention_ms is not None
    record.attention_ms = record.self_attention_ms
    record.self_attention_share = record.self_attention_ms / record.latency_ms
    record.tflops = layers * sum(flops.values()) / record.latency_ms / 1e9
    record.attention_tflops = layers * flops["attention"] / record.self_attention_ms / 1e9
    record.ok = finite
    if not finite:
        record.status, record.error = "failed", "the output is not finite"
    return record
