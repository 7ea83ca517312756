"""A Wan pipeline small enough for tests, with random weights, and clips from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

import hcms
from hcms_lab.ground.model_config import ModelConfig
from ranks import Place

diffusers = pytest.importorskip("diffusers", reason="needs the extra: pip install -e '.[diffusers]'")

SIZE = {"height": 32, "width": 48, "num_frames": 9}  # 3 x 4 x 6 = 72 tokens

TRANSFORMER = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 8,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 32,
}
VAE = {
    "base_dim": 3,
    "z_dim": 16,
    "dim_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 4,
}
TEXT = {"vocab_size": 384, "d_model": 16, "d_ff": 32, "num_heads": 2, "d_kv": 8, "num_layers": 1,
        "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu"}  # fmt: skip
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000}


def tiny(task: str = "t2v", *, expand_timesteps: bool = False, experts: int = 2) -> ModelConfig:
    extra = 20 if task == "i2v" and not expand_timesteps else 0  # mask and image latents
    return ModelConfig(
        name="tiny",
        task=task,
        experts=experts,
        boundary_ratio=0.875 if experts == 2 else None,
        expand_timesteps=expand_timesteps,
        transformer={**TRANSFORMER, "in_channels": 16 + extra},
        vae=VAE,
        text_encoder=TEXT,
        scheduler=SCHEDULER,
        dtype="float32",
        text_tokens=16,
        flow_shift=5.0,
    )


@cache
def pipeline(task: str = "t2v", expand_timesteps: bool = False, experts: int = 2) -> Any:
    from hcms_lab.measure.wan.build import random_pipeline

    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
    pipe = random_pipeline(tiny(task, expand_timesteps=expand_timesteps, experts=experts), torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(pipe: Any, *, guidance: float = 4.0, seed: int | None = 0, steps: int = 2, **size: int) -> torch.Tensor:
    arguments: dict[str, Any] = {**SIZE, **size}
    if isinstance(pipe, diffusers.WanImageToVideoPipeline):
        from PIL import Image

        arguments["image"] = Image.linear_gradient("L").convert("RGB").resize((arguments["width"], arguments["height"]))
    return torch.from_numpy(
        pipe(
            prompt="a cat and a dog",
            negative_prompt="a cake",
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=16,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            output_type="np",
            **arguments,
        ).frames
    )


INPUTS = {
    "hidden_states": torch.randn(2, 16, 3, 8, 12, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([900, 900]),
    "encoder_hidden_states": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2)),
}


def expert() -> Any:
    """A transformer of a test's own, which it may leave changed."""
    from hcms_lab.measure.wan.build import random_pipeline

    return random_pipeline(tiny(experts=1), torch.device("cpu")).transformer


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).sample


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextmanager
def parallel(model: Any, place: Place, **options: Any) -> Iterator[Any]:
    hcms.parallelize(model, place.gloo, **{"plan": "even:2", **options})
    try:
        yield model
    finally:
        hcms.restore(model)
