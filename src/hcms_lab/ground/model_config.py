"""The configuration of a whole pipeline: which model, which weights, which clip. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    """A video pipeline as diffusers and transformers build it; `conf/model/*.yaml` holds one a file.

    `transformer`, `vae`, `text_encoder` and `scheduler` are the arguments of WanTransformer3DModel, AutoencoderKLWan,
    UMT5Config and UniPCMultistepScheduler, so that random weights need no network.
    """

    name: str = ""
    task: str = "t2v"  # t2v | i2v
    hub: str | None = None  # where weights=pretrained finds it when no weights_path is given
    experts: int = 1  # denoising transformers of this one architecture
    boundary_ratio: float | None = None  # share of the training steps at which the second expert takes over
    expand_timesteps: bool = False  # a timestep a token (TI2V-5B)
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"  # of transformers and text encoder; the VAE runs in float32, as diffusers advises for Wan
    width: int = 1280
    height: int = 720
    frames: int = 81  # video frames, 4n + 1
    fps: int = 16
    steps: int = 40
    flow_shift: float = 5.0
    guidance: float = 1.0  # of the first (high-noise) expert; 1 is none
    guidance_2: float | None = None  # of the second (low-noise) expert
    text_tokens: int = 512
    decode_mflop_a_pixel: float | None = None  # of the VAE's decoder, for predictions


@dataclass
class WanConfig:
    """What a run of a whole pipeline needs beside what every experiment has. Null is the model's own value."""

    model: ModelConfig = field(default_factory=ModelConfig)
    weights: str = "random"  # random | pretrained
    weights_path: str | None = None  # a folder written by save_pretrained, or a hub name; null is the model's own
    width: int | None = None
    height: int | None = None
    steps: int | None = None  # denoising steps a clip
    flow_shift: float | None = None
    guidance: float | None = None
    guidance_2: float | None = None
    prompt: str = "A cat and a dog bake a cake together in a sunlit kitchen."
    negative_prompt: str = ""
    image: str | None = None  # first frame for i2v: a picture's path; null is a colour gradient
    sharding: str = "none"  # none | fsdp2
    vae_tiling: bool = False  # decode in tiles: less memory, other frames at the tiles' edges
    compare_plain: bool = False  # also run the unchanged pipeline on each rank alone, and compare frames with it
    dry: bool = False  # check sizes and memory, load nothing
    memory_gib: float | None = None  # memory a rank that the check counts with; null is what is there
