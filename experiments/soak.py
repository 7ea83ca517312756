"""Hours in minutes: a benchmark's cases over and over in one process group; nothing may grow, no result may change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcms_lab.ground.checks import number
from hcms_lab.ground.errors import UsageError
from hcms_lab.measure.cases import EMULATED, device_of, link_of, one_for_all, ranks_of
from hcms_lab.measure.progress import progress
from microbench import Settings as Layers
from microbench import grid
from microbench import validate as validate_grid


@dataclass
class Settings(Layers):
    kind: str = "soak"
    minutes: float = 30.0


def validate(cfg: Settings) -> None:
    """Refuse what could not run before any rank starts."""
    number("minutes", cfg.minutes, 0, 7 * 24 * 60, above=True)
    if len(ranks_of(cfg)) > 1:
        raise UsageError(f"ranks={cfg.ranks}: it is one process group that is soaked; give one number")
    if link_of(cfg) == EMULATED and cfg.link.gbps is None:
        raise UsageError("link.gbps=null: a ratio would be measured anew on every run; give a bandwidth")
    if cfg.resume is not None:
        raise UsageError(f"resume={cfg.resume}: what a process holds cannot be gone on with; start a new run")
    validate_grid(cfg)


def run(cfg: Settings, folder: Path) -> bool:
    """Soak, plot, and print what grew; True if nothing did and every result was right."""
    from hcms_lab.ground.soak_samples import read
    from hcms_lab.measure.job import Job
    from hcms_lab.measure.launch import launch
    from hcms_lab.measure.soak import SAMPLES, growth
    from hcms_lab.report.soak import soak_figure

    device, link = device_of(cfg), link_of(cfg)
    (ranks,) = ranks_of(cfg)
    job = Job.of(cfg, ranks, tuple(grid(cfg)), folder)
    with progress(0, cfg.name) as (ticks, show):
        launch(
            _on_rank, ranks, job, cfg.minutes, ticks,
            device=device, link=link, folder=folder, poll=show, timeout_s=cfg.bench.timeout_s,
        )  # fmt: skip
    samples = read(folder / SAMPLES)
    grew = growth(samples)
    soak_figure(samples).savefig(folder / "soak.png")
    who = f"one rank of {ranks}" if one_for_all(cfg) else f"{ranks} ranks"
    print(f"{max(s.cycle for s in samples) + 1} cycles on {who} in {samples[-1].minute:.1f} minutes")
    print("\n".join(grew) or "memory, open files, threads and results stayed as they were")
    return not grew


def _on_rank(rank: Any, job: Any, minutes: float, ticks: Any) -> None:
    from hcms_lab.measure.link import settle
    from hcms_lab.measure.soak import soak

    settle(rank, job, job.points[0], {})
    soak(rank, job, minutes, ticks.put)
