"""Measure a profile of the ranks at hand and write it as `profile.yaml`; other runs read it with `profile=<path>`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hcms_lab.ground.config import LayerConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.measure.cases import device_of, link_of, points


@dataclass
class Settings(LayerConfig):
    kind: str = "calibrate"


def validate(cfg: Settings) -> None:
    """One number of ranks, one link, one kernel and one dtype make one profile."""
    grid = points(cfg)
    if len({(p.ranks, p.link_ratio, p.kernel, p.dtype) for p in grid}) > 1:
        raise UsageError(
            "ranks, link.ratio, kernels or workload.dtype: a profile is of one of each; give one value of each"
        )
    import torch

    from hcms.kernels import kernel

    point = grid[0]
    if refusal := kernel(point.kernel).refusal(getattr(torch, point.dtype), point.head_dim, device_of(cfg)):
        raise UsageError(f"kernels={point.kernel}: {refusal}")


def run(cfg: Settings, folder: Path) -> bool:
    """Calibrate at every length, settle the link at the longest, and write the profile."""
    from hcms.schedule.profile import load
    from hcms_lab.measure.job import Job
    from hcms_lab.measure.launch import launch

    device, link, grid = device_of(cfg), link_of(cfg), points(cfg)
    ranks = grid[0].ranks
    job = Job.of(cfg, ranks, tuple(grid), folder, ratio_at="longest")
    launch(_on_rank, ranks, job, device=device, link=link, folder=folder, timeout_s=cfg.bench.timeout_s)
    path = folder / "profile.yaml"
    profile = load(path)
    shown = Table(title=f"{profile.hardware}, {profile.world_size} ranks, {profile.backend}: {profile.link}")
    for column in ("tokens", "heads", "attention ms"):
        shown.add_column(column, justify="right")
    for p in profile.attend:
        shown.add_row(f"{p.seq_len:,}", str(p.heads), f"{p.ms:.2f}")
    Console().print(shown)
    shown_path = os.path.relpath(path)
    print(f"wrote {shown_path}; use it with profile={shown_path}")
    return True


def _on_rank(rank: Any, job: Any) -> None:
    import torch

    from hcms_lab.measure.link import settle
    from hcms_lab.measure.measure import point_profile
    from hcms_lab.measure.wire import wire

    job = replace(job, predict=True, profile=None)  # a profile is what is wanted, and measured
    gbps_of_ratio: dict[float, float] = {}
    profiles = []
    for point in job.points:
        settle(rank, job, point, gbps_of_ratio)
        wire(job.link, point)  # a link of memory must have it first
        with torch.inference_mode():
            profiles.append(point_profile(rank, job, point))
    if rank.first:
        attend = tuple(sorted((p for profile in profiles for p in profile.attend), key=lambda p: (p.seq_len, p.heads)))
        replace(profiles[0], attend=attend).save(Path(job.folder) / "profile.yaml")
