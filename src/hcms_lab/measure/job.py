"""What every rank of one launch needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcms.hardware import cores, hardware
from hcms_lab.ground.config import Config
from hcms_lab.measure.cases import Point, device_of, latency_us_of, link_of

SUSTAINED, RESTED = "sustained", "rested"


@dataclass(frozen=True)
class Job:
    """What every rank of one launch needs to know.

    Args:
        exp, hardware: go into every record.
        link: a name of `hcms.links`; `gbps` fixes a paced link's bandwidth, else each point's ratio does.
        ratio_at: `longest` derives it once a ratio, at the first point that has it, and a number at so many frames;
            `each`, at every point.
        load: `sustained` times blocks of back-to-back calls of `block_ms`; `rested` single calls, each after `rest_ms`.
        transport: what carries our own methods' chunks, a name of `hcms.transport`.
        graph: whether repeated calls may be replayed as CUDA graphs (`auto`, `off`).
        gbps_of_ratio: bandwidths derived in the run that this one resumes.
        profile: a profile's path, for predictions and cuts that are "auto"; measured at each point where None.
        predict: whether records say what the simulator predicted.
        ranks_per_core: where ranks share cores, records say so.
        sweeps: several rank counts or link ratios are wanted: one that is out of reach is a refused row, not an error.
    """

    exp: str
    hardware: str
    link: str
    gbps: float | None
    latency_us: float
    ratio_at: str | int
    iterations: int
    warmup: int
    seed: int
    profile: str | None
    predict: bool
    ranks_per_core: float | None
    points: tuple[Point, ...]
    folder: str
    load: str = RESTED
    block_ms: float = 250.0
    rest_ms: float = 0.0
    graph: str = "off"
    transport: str = "collective"
    gbps_of_ratio: Mapping[float, float] = field(default_factory=dict)
    sweeps: bool = False

    @classmethod
    def of(cls, cfg: Config, ranks: int, points: tuple[Point, ...], folder: Path, **changes: Any) -> Job:
        """The job of a checked configuration on so many ranks."""
        device = device_of(cfg)
        on_gpu = device == "cuda"
        load = cfg.bench.load if cfg.bench.load != "auto" else SUSTAINED if on_gpu else RESTED
        fields: dict[str, Any] = {
            "exp": cfg.name,
            "hardware": hardware(device).slug,
            "link": link_of(cfg),
            "gbps": cfg.link.gbps,
            "latency_us": latency_us_of(cfg),
            "ratio_at": cfg.link.ratio_at,
            "iterations": cfg.bench.iterations,
            "warmup": cfg.bench.warmup,
            "seed": cfg.bench.seed,
            "profile": cfg.profile,
            "predict": cfg.bench.predict,
            "ranks_per_core": max(1.0, ranks / cores()) if not on_gpu else None,
            "points": points,
            "folder": str(folder),
            "load": load,
            "block_ms": cfg.bench.block_ms,
            "rest_ms": cfg.bench.rest_ms if on_gpu else 0.0,
            "graph": cfg.bench.graph if on_gpu else "off",
            "transport": cfg.transport,
        }
        return cls(**{**fields, **changes})
