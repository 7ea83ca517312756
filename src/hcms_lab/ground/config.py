"""The typed blocks that settings are made of; Hydra composes them, struct mode refuses unknown keys.

A kind of experiment is a script in experiments/ with a dataclass `Settings`, made of what stands here: `BaseConfig` for
every one; `Config` for those that start ranks; `LayerConfig` for those that measure one attention layer; `CasesConfig`
for those that set methods against each other. Whole pipelines add `ClipConfig` of `ground/model_config.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

AXES = ("seq_len", "comm_ratio", "world_size", "chunks")
WANDB_MODES = ("offline", "online", "disabled")


@dataclass
class AboutConfig:
    """What an experiment is, for lists, the README, `make reproduce` and W&B. Says nothing about how it is measured."""

    title: str = MISSING  # a sentence
    budget_min: float | None = None  # minutes on 2 idle cores; null keeps it out of `make reproduce`
    gpus: int = 0  # so many at least
    axis: str = "seq_len"  # seq_len | comm_ratio | world_size | chunks: W&B's step metric


@dataclass
class WorkloadConfig:
    """The attention layer that is measured. `heads` counts all ranks' heads."""

    name: str = MISSING
    tokens_per_frame: int = MISSING  # of a latent frame
    heads: int = MISSING
    head_dim: int = 128
    batch: int = 1
    dtype: Any = MISSING  # float32 | bfloat16 | float16, or a list of them


@dataclass
class LinkConfig:
    """What carries the exchanges.

    `emulated` paces Gloo to `latency_us` and a bandwidth: `gbps` where given, else derived so that serial Ulysses
    has the communication ratio `ratio` (a list sweeps it). `native` is what the process group has: NCCL or Gloo.
    `ghost` is one rank of P on one GPU, its peers pinned memory behind the card's own PCIe; `gbps` and `latency_us`
    may slow it. `shared` is several NCCL ranks on one GPU, through the host's memory. `auto` is `native` on several
    GPUs, `ghost` on one and `emulated` without.
    """

    kind: str = "auto"  # auto | native | ghost | shared | emulated
    ratio: Any = 0.25  # a ratio or a list of them, each in (0, 1); for an emulated link without gbps
    ratio_at: Any = "longest"  # derive the bandwidth at the longest sequence, at `each`, or at so many latent frames
    gbps: float | None = None  # 10^9 bytes a second leaving a rank
    latency_us: float | None = None  # null is 50 on an emulated link, nothing on others


@dataclass
class RoundsConfig:
    warmup: int = 2
    iterations: int = 12


@dataclass
class BenchConfig(RoundsConfig):
    seed: int = 0
    predict: bool = True  # calibrate at each point and record what the simulator predicts
    load: str = "auto"  # sustained (blocks of back-to-back calls) | rested (single calls); auto: sustained on GPUs
    block_ms: float = 250.0  # of a sustained block
    rest_ms: float = 30.0  # on GPUs, before a rested call
    graph: str = "auto"  # auto | off: whether repeated calls are replayed as CUDA graphs
    timeout_s: float = 600.0  # how long a rank waits for the others before the run ends


def _wandb_mode() -> str:
    """What W&B's own variable asks for, where that is one of the modes here."""
    asked = os.environ.get("WANDB_MODE", "")
    return asked if asked in WANDB_MODES else WANDB_MODES[0]


@dataclass
class WandbConfig:
    mode: str = field(default_factory=_wandb_mode)  # offline | online | disabled; offline unless WANDB_MODE says so
    project: str = "hcms"
    entity: str | None = None


@dataclass
class BaseConfig:
    """What every experiment has."""

    name: str = MISSING  # fig3, table2, ...: names the folder under outputs/
    kind: str = MISSING  # the script in experiments/ that measures it
    about: AboutConfig = field(default_factory=AboutConfig)
    device: str = "auto"  # auto | cpu | cuda
    on_gpus: list[str] = field(
        default_factory=list
    )  # settings that hold where GPUs are visible, as one would type them
    on_link: dict[str, list[str]] = field(default_factory=dict)  # those that hold beyond them on a link that is named
    wandb: WandbConfig = field(default_factory=WandbConfig)
    output: str = "outputs"
    resume: str | None = None  # a run's folder: skip the cases that its records already hold


@dataclass
class Config(BaseConfig):
    """What an experiment has that starts ranks."""

    ranks: Any = None  # an int, a list, or `each` (2, 4, 8); null is every visible GPU, or 2 without any
    link: LinkConfig = field(default_factory=LinkConfig)
    transport: str = "collective"  # what carries our methods' chunks: collective | copy-engine
    kernels: list[str] = field(default_factory=lambda: ["sdpa"])  # [all] is every kernel that can run here
    bench: BenchConfig = field(default_factory=BenchConfig)
    profile: str | None = None  # a profile that +exp=calibrate wrote; null calibrates at each point


@dataclass
class LayerConfig(Config):
    """What an experiment has that measures one attention layer."""

    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    latent_frames: Any = field(default_factory=lambda: [9, 11, 13, 16])  # the sequence's length: an int or a list


@dataclass
class CasesConfig:
    """Who is measured: methods, and how those that cut heads cut them."""

    methods: list[str] = field(
        default_factory=lambda: ["ulysses", "ulysses-packed", "hcms-serial", "hcms", "ring", "ceiling"]
    )
    cuts: list[str] = field(default_factory=lambda: ["even:2"])
    prefetch: int | None = None  # chunks exchanged ahead; null is all
    first: str = "exchange"  # exchange | return
