"""A profile from measured samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median, median_low
from typing import Any

from hcms.schedule.profile import AttendPoint, Level, Profile


def fit(
    samples: Iterable[Mapping[str, Any]],
    *,
    hardware: str,
    device: str,
    world_size: int,
    backend: str,
    link: str,
    kernel: str,
    dtype: str,
    head_dim: int,
    batch: int = 1,
    sms: int | None = None,
    ports: int = 1,
) -> Profile:
    """A profile from measured samples, each the time of the slowest rank; low medians where a size was measured often.

    Args:
        samples: mappings with `op` and, by op:
            `attend` and `attend_lse`: `seq_len`, `heads`, `ms`;
            `exchange` and `rotate`: `bytes_off_rank`, `ms` (the link alone, packed already);
            `pack`, `unpack`, `merge`: `bytes`, `ms` (merge: bytes of float32 output);
            `host`: `ms`; `interference`: `attention_slowdown`, `communication_slowdown`;
            `occupancy`: `holds_sms`, `wire_needs_sms`, `fill_speedup`; `sustained`: as `attend` (GPUs).
            `attend` is needed, and `exchange` from 2 ranks on. Without `unpack`, it is taken to be as `pack`; without
            `merge`, as twice `pack`; the rest as nothing.
        hardware, device, world_size, backend, link, kernel, dtype, head_dim, batch, sms, ports: as in `Profile`.

    Raises:
        ValueError: an unknown op, a sample without its fields, or no sample of an op that is needed.
    """
    by_op: dict[str, list[Mapping[str, Any]]] = {name: [] for name in _NEEDS}
    for sample in samples:
        op = sample.get("op")
        if op not in by_op:
            raise ValueError(f"sample {dict(sample)}: unknown op {op!r}, wanted one of {', '.join(by_op)}")
        if lacking := [name for name in _NEEDS[op] if name not in sample]:
            raise ValueError(f"sample {dict(sample)}: {op} needs {', '.join(lacking)}")
        by_op[op].append(sample)
    for op in ("attend", *(("exchange",) if world_size > 1 else ())):
        if not by_op[op]:
            raise ValueError(f"no sample of op {op!r}: a profile of {world_size} ranks needs at least one")

    attend = _medians(by_op["attend"], "seq_len", "heads")
    sustained = _medians(by_op["sustained"], "seq_len", "heads")
    points = tuple(
        AttendPoint(seq_len, heads, ms, max(ms, hot_ms) if (hot_ms := sustained.get((seq_len, heads))) else None)
        for (seq_len, heads), ms in sorted(attend.items())
    )
    latency_ms, gbps = _latency_and_gbps(by_op["exchange"]) if by_op["exchange"] else (0.0, math.inf)
    rotate_gbps = _latency_and_gbps(by_op["rotate"])[1] if by_op["rotate"] else None
    pack = _ms_per_gb(by_op["pack"], 0.0)
    profile = Profile(
        hardware=hardware,
        device=device,
        world_size=world_size,
        backend=backend,
        link=link,
        kernel=kernel,
        dtype=dtype,
        head_dim=head_dim,
        batch=batch,
        attend=points,
        levels=(Level(gbps, latency_ms, rotate_gbps=rotate_gbps),),
        pack_ms_per_gb=pack,
        unpack_ms_per_gb=_ms_per_gb(by_op["unpack"], pack),
        merge_ms_per_gb=_ms_per_gb(by_op["merge"], 2 * pack),
        host_ms=median_low([s["ms"] for s in by_op["host"]] or [0.0]),
        attention_slowdown=max(1.0, median_low([s["attention_slowdown"] for s in by_op["interference"]] or [1.0])),
        communication_slowdown=max(
            1.0, median_low([s["communication_slowdown"] for s in by_op["interference"]] or [1.0])
        ),
        holds_sms=any(s["holds_sms"] for s in by_op["occupancy"]),
        wire_needs_sms=any(s["wire_needs_sms"] for s in by_op["occupancy"]) if by_op["occupancy"] else True,
        fill_speedup=median_low([s["fill_speedup"] for s in by_op["occupancy"]] or [1.0]),
        sms=sms,
        ports=ports,
    )
    with_lse = _medians(by_op["attend_lse"], "seq_len", "heads")
    slowdowns = [ms / profile.attention_ms(seq_len, heads, batch) for (seq_len, heads), ms in with_lse.items()]
    return replace(profile, lse_slowdown=median(slowdowns or [1.0]))


_NEEDS: dict[str, tuple[str, ...]] = {
    "attend": ("seq_len", "heads", "ms"),
    "attend_lse": ("seq_len", "heads", "ms"),
    "exchange": ("bytes_off_rank", "ms"),
    "rotate": ("bytes_off_rank", "ms"),
    "pack": ("bytes", "ms"),
    "unpack": ("bytes", "ms"),
    "merge": ("bytes", "ms"),
    "host": ("ms",),
    "interference": ("attention_slowdown", "communication_slowdown"),
    "occupancy": ("holds_sms", "wire_needs_sms", "fill_speedup"),
    "sustained": ("seq_len", "heads", "ms"),
}


def _medians(samples: list[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], float]:
    """Median ms for each size; of an even number the lower, since what disturbs a measurement makes it longer."""
    by_size: dict[tuple[Any, ...], list[float]] = {}
    for sample in samples:
        by_size.setdefault(tuple(sample[key] for key in keys), []).append(float(sample["ms"]))
    return {size: median_low(times) for size, times in by_size.items()}


def _ms_per_gb(samples: list[Mapping[str, Any]], otherwise: float) -> float:
    """Time by size, large samples counting by their size."""
    if not samples:
        return otherwise
    sizes = _medians(samples, "bytes")
    return 1e9 * sum(sizes.values()) / sum(size for (size,) in sizes)


def _latency_and_gbps(samples: list[Mapping[str, Any]]) -> tuple[float, float]:
    """Fit ms = latency + bytes / bandwidth, weighting relative errors alike, with neither part below zero."""
    sizes = [(float(size), ms) for (size,), ms in _medians(samples, "bytes_off_rank").items()]
    weights = [1 / ms**2 for _, ms in sizes]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, sizes, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, sizes, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, sizes, strict=True))
    product = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, sizes, strict=True))
    if mean_x == 0:  # one rank alone sends nothing
        return 0.0, math.inf
    sloped = len(sizes) > 1 and spread > 0  # of one size, rounding alone would make a spread
    slope = product / spread if sloped else mean_y / mean_x
    latency_ms = mean_y - slope * mean_x
    if slope <= 0:  # faster than can be told: no bytes are too many
        return median(ms for _, ms in sizes), math.inf
    if latency_ms < 0 or not sloped:
        latency_ms = 0.0
        slope = sum(w * x * y for w, (x, y) in zip(weights, sizes, strict=True)) / sum(
            w * x * x for w, (x, _) in zip(weights, sizes, strict=True)
        )
    return latency_ms, 1 / (slope * 1e6)
