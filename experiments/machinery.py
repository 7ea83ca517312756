"""The cost of the machinery: host time of a warm call and of a chunk, with a kernel and a link that cost nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from hcms.methods import METHODS
from hcms_lab.ground.checks import as_list, whole
from hcms_lab.ground.config import BaseConfig, RoundsConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.layers import check_heads
from hcms_lab.measure.cases import EACH, Case, cases_of, check_ranks, check_rounds, device_of

TARGET_US = 150.0  # a chunk, on CPU
_MEASURED = [m.name for m in METHODS.values() if not m.needs_lse and m.counts == "latency"]


@dataclass
class Settings(BaseConfig):
    kind: str = "machinery"
    heads: int = 20  # of all ranks
    ranks: Any = 2  # an int, a list, or `each` (2, 4, 8): so many are pretended, none starts
    methods: list[str] = field(default_factory=lambda: list(_MEASURED))
    cuts: list[str] = field(default_factory=lambda: ["even:1", "even:2", "even:5", "even:max"])
    bench: RoundsConfig = field(default_factory=lambda: RoundsConfig(iterations=2000))


def validate(cfg: Settings) -> None:
    """Refuse what the free link cannot carry."""
    if device_of(cfg) != "cpu":
        raise UsageError("device=cuda: this measures the lanes on CPU; make gpu-one measures those on a GPU")
    whole("heads", cfg.heads, high=4096)
    check_rounds(cfg.bench)
    check_ranks(cfg.ranks)
    for ranks in _ranks(cfg):
        whole("ranks", ranks, high=4096)
        check_heads(cfg.heads, ranks, "heads")
        if unfit := [c.method for c in _cases(cfg, ranks) if c.method not in _MEASURED or c.cut == "auto"]:
            raise UsageError(f"methods={unfit[0]}: choose of {', '.join(_MEASURED)}, and cuts other than auto")


def run(cfg: Settings, folder: Path) -> bool:
    """Measure every case, record it and print the table; True if a chunk stays under its target."""
    import numpy as np
    import torch

    from hcms.hardware import hardware
    from hcms_lab.ground.records import Record, RecordFile
    from hcms_lab.measure.machinery import FreeAttention, Operations, free_link, host_times_ms, small_inputs
    from hcms_lab.measure.memory import allocations

    torch.set_num_threads(1)
    file, slug = RecordFile(folder / "records.jsonl"), hardware("cpu").slug
    shown = Table(title=f"{cfg.name}: {slug}, kernel and link at no cost")
    for column in ("ranks", "method", "cut", "µs a call", "± IQR", "operations", "allocations"):
        shown.add_column(column, justify="left" if column in ("method", "cut") else "right")
    us_by_chunks: dict[str, dict[int, float]] = {}
    for ranks in _ranks(cfg):
        with free_link(ranks), torch.inference_mode():
            x = small_inputs(cfg.heads)
            for case in _cases(cfg, ranks):
                attention = FreeAttention(case.method, case.cut or str(cfg.heads // ranks))
                times_ms = host_times_ms(attention, x, cfg.bench.iterations, max(cfg.bench.warmup, 20))
                with Operations() as operations:
                    attention(**x)
                allocated = sum(nbytes > 0 for nbytes in allocations(partial(attention, **x)))
                assert attention.schedule is not None
                q25, q50, q75, q95 = (float(q) for q in np.percentile(times_ms, [25, 50, 75, 95]))
                chunks = len(attention.schedule.cut)
                us_by_chunks.setdefault(f"{case.method} on {ranks} ranks", {})[chunks] = q50 * 1e3
                record = Record(
                    exp=cfg.name,
                    hardware=slug,
                    workload="machinery",
                    world_size=ranks,
                    method=f"host:{case.method}",
                    kernel="free",
                    link="free",
                    dtype="float32",
                    batch=1,
                    seq_len=x["q_BLNH"].shape[1] * ranks,
                    heads=cfg.heads,
                    head_dim=x["q_BLNH"].shape[3],
                    cut=case.cut,
                    schedule=attention.schedule.name,
                    latency_ms=q50,
                    latency_iqr_ms=q75 - q25,
                    latency_p95_ms=q95,
                    n=len(times_ms),
                    warmup=max(cfg.bench.warmup, 20),
                    actual_path=f"{operations.counts.total()} operations, {allocated} allocations",
                )
                file.append([record])
                shown.add_row(
                    str(ranks), case.method, case.cut or "-", f"{q50 * 1e3:.0f}", f"{(q75 - q25) * 1e3:.0f}",
                    str(operations.counts.total()), str(allocated),
                )  # fmt: skip
    console = Console()
    console.print(shown)
    chunk_us = {name: _slope(found) for name, found in us_by_chunks.items() if len(found) > 1}
    for name, us in chunk_us.items():
        console.print(f"{name}: {us:.0f} µs a further chunk (target: under {TARGET_US:.0f})")
    return all(us < TARGET_US for us in chunk_us.values())


def _ranks(cfg: Settings) -> list[Any]:
    return [2, 4, 8] if cfg.ranks == EACH else as_list(cfg.ranks)


def _cases(cfg: Settings, ranks: int) -> tuple[Case, ...]:
    return cases_of(cfg.methods, cfg.cuts, cfg.heads // ranks, ranks)


def _slope(us_by_chunks: dict[int, float]) -> float:
    """Microseconds that one more chunk takes: the median of the slopes between all pairs of chunk counts."""
    found: list[Any] = sorted(us_by_chunks.items())
    return median((b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(found) for b in found[i + 1 :])
