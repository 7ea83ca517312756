"""Time the cases of a point against each other, and check every timed output."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hcms.calibrate import calibrate
from hcms.kernels import kernel
from hcms.schedule.cost import Workload, WorkloadCosts, predict
from hcms.schedule.profile import Profile, load
from hcms.schedule.schedule import Schedule
from hcms.schedule.timeline import Timeline
from hcms.transport.layout import LayerShape
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.names import PEER
from hcms_lab.ground.records import Record, RecordFile
from hcms_lab.measure.cases import Case, Point
from hcms_lab.measure.contestant import Contestant, contestant
from hcms_lab.measure.inputs import SETS, Reference, reference, shard
from hcms_lab.measure.job import Job
from hcms_lab.measure.launch import Rank
from hcms_lab.measure.link import settle
from hcms_lab.measure.memory import peak_bytes
from hcms_lab.measure.together import gathered, timed_call

ULYSSES = Case("ulysses", None)


@dataclass
class _Timed:
    """A contestant and what its calls gave."""

    case: Case
    entrant: Contestant | None = None
    error: str | None = None
    status: str = "done"
    times_ms: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    communication_ms: list[float] = field(default_factory=list)
    max_abs_err: float = 0.0
    bitwise_equal: bool = True
    peak_bytes: int = 0
    timelines: list[Timeline] = field(default_factory=list)


def measure(rank: Rank, job: Job, tick: Callable[[str], None]) -> None:
    """Measure all points of a job on this rank; the first rank appends the records of each point when it is done.

    `tick` is called on the first rank after every timed call's round, with the point's title.
    """
    records = RecordFile(Path(job.folder) / "records.jsonl")
    gbps_of_ratio = dict(job.gbps_of_ratio)
    for point in job.points:
        try:
            gbps = settle(rank, job, point, gbps_of_ratio)
        except UsageError as error:  # the same on every rank: the ratio is below what this machine can reach
            if not job.sweeps:
                raise
            found = [_refused(job, point, case, str(error)) for case in point.cases]
        else:
            found = measure_point(rank, job, point, gbps, tick)
        if rank.first:
            records.append(found)


def _record(job: Job, point: Point, case: Case, **fields: Any) -> Record:
    """What a case's record says whatever came of it."""
    return Record(
        exp=job.exp,
        hardware=job.hardware,
        workload=point.workload,
        link=job.link,
        link_ratio=point.link_ratio,
        world_size=point.ranks,
        method=case.method,
        peer_kind=case.peer_kind,
        kernel=point.kernel,
        dtype=point.dtype,
        batch=point.batch,
        seq_len=point.seq_len,
        heads=point.heads,
        head_dim=point.head_dim,
        cut=case.cut,
        seed=job.seed,
        frames=point.frames,
        prefetch=case.prefetch,
        warmup=job.warmup,
        ranks_per_core=job.ranks_per_core,
        **fields,
    )


def _refused(job: Job, point: Point, case: Case, why: str) -> Record:
    """A point of a sweep that this machine cannot offer is a row, not the end of the sweep."""
    return _record(job, point, case, status="refused", error=why)


def measure_point(rank: Rank, job: Job, point: Point, gbps: float | None, tick: Callable[[str], None]) -> list[Record]:
    """Interleave the point's cases in shuffled rounds; every rank returns the same records."""
    inputs = [shard(point, job.seed, i, rank.rank, rank.device) for i in range(SETS)]
    references = [reference(point, job.seed, i, rank.rank, rank.device) for i in range(SETS)]
    with torch.inference_mode():
        profile = point_profile(rank, job, point)
        ulysses = contestant(ULYSSES, point.kernel, None, None)
        expected = [ulysses(**_named(x)) for x in inputs]
        timed = [_Timed(case) for case in point.cases]
        for t in timed:
            _warm_up(rank, job, point, t, inputs, profile)
        running = [t for t in timed if t.entrant is not None]
        for iteration in range(job.iterations):
            order = running.copy()
            random.Random(job.seed * 100_003 + iteration).shuffle(order)
            which = iteration % SETS
            for t in order:
                _time_once(rank, t, inputs[which], references[which], expected[which])
            if rank.first:
                tick(point.title)
    return _records(rank, job, point, gbps, timed, references, profile)


def _named(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}_BLNH": x for name, x in inputs.items()}


def _warm_up(
    rank: Rank, job: Job, point: Point, t: _Timed, inputs: list[dict[str, Tensor]], profile: Profile | None
) -> None:
    """Construct and warm up a contestant; if it fails on any rank, all ranks leave it out."""
    try:
        t.entrant = contestant(t.case, point.kernel, None, profile)
        for i in range(job.warmup):
            t.entrant(**_named(inputs[i % SETS]))
        entrant = t.entrant
        t.peak_bytes = entrant.buffer_bytes + peak_bytes(lambda: entrant(**_named(inputs[0])), rank.device)
    except (ValueError, RuntimeError, ImportError) as error:
        traceback.print_exc()
        t.status = "out-of-memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
        t.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    failures = [x for x in gathered(rank, (t.status, t.error)) if x[1] is not None]
    if failures:
        t.status, t.error = failures[0]
        t.entrant = None


def _time_once(rank: Rank, t: _Timed, inputs: dict[str, Tensor], reference: Reference, expected: Tensor) -> None:
    entrant = t.entrant
    assert entrant is not None
    entrant.poison()
    out, wall_ms = timed_call(rank, lambda: entrant(**_named(inputs)))
    timeline = entrant.timeline
    if timeline is not None:
        t.attention_ms.append(timeline.attention_ms)
        t.communication_ms.append(timeline.communication_ms)
        t.timelines.append(timeline)
    t.times_ms.append(timeline.attention_ms if t.case.method == "ceiling" and timeline is not None else wall_ms)
    t.max_abs_err = max(t.max_abs_err, reference.error(out))
    t.bitwise_equal &= torch.equal(out, expected)


def point_profile(rank: Rank, job: Job, point: Point) -> Profile | None:
    """The profile that this point's predictions and automatic cuts stand on, if any do."""
    group = dist.group.WORLD
    assert group is not None
    if not job.predict and not any(case.cut == "auto" for case in point.cases):
        return None
    attention = kernel(point.kernel)
    if job.profile is not None:
        return load(
            job.profile,
            hardware=job.hardware,
            device=rank.device.type,
            world_size=point.ranks,
            backend=dist.get_backend(group),
            kernel=point.kernel,
            dtype=point.dtype,
            head_dim=point.head_dim,
        )
    shape = LayerShape(point.batch, point.seq_len // point.ranks, point.heads, point.head_dim)
    dtype, heads_first = getattr(torch, point.dtype), rank.device.type == "cpu"
    return calibrate(group, shape, dtype, rank.device, attention, hardware=job.hardware, heads_first=heads_first)


def _predicted_ms(point: Point, case: Case, schedule: Schedule, profile: Profile | None) -> float | None:
    if profile is None:
        return None
    workload = Workload(point.seq_len, point.heads, point.ranks, point.head_dim, point.batch, point.dtype)
    timeline = predict(schedule, WorkloadCosts(profile, workload))
    return timeline.attention_ms if case.method == "ceiling" else timeline.duration_ms


class _Given(NamedTuple):
    """What one rank measured of one case."""

    times_ms: list[float]
    attention_ms: list[float]
    communication_ms: list[float]
    max_abs_err: float
    bitwise_equal: bool
    peak_bytes: int
    bound: float
    kernel_max_abs_err: float


def _median_of_slowest(values_by_rank: list[list[float]]) -> float | None:
    """The median over iterations of the slowest rank's value."""
    return float(median(map(max, zip(*values_by_rank, strict=True)))) if values_by_rank and values_by_rank[0] else None


def _records(
    rank: Rank,
    job: Job,
    point: Point,
    gbps: float | None,
    timed: list[_Timed],
    references: list[Reference],
    profile: Profile | None,
) -> list[Record]:
    found: dict[Case, Record] = {}
    for number, t in enumerate(timed):
        mine = _Given(
            t.times_ms, t.attention_ms, t.communication_ms, t.max_abs_err, t.bitwise_equal, t.peak_bytes,
            max(r.bound for r in references), max(r.kernel_max_abs_err for r in references),
        )  # fmt: skip
        given: list[_Given] = gathered(rank, mine)
        bound = max(g.bound for g in given)
        times_ms = [float(x) for x in map(max, zip(*(g.times_ms for g in given), strict=True))]
        record = _record(
            job,
            point,
            t.case,
            status=t.status,
            link_gbps=gbps,
            error=t.error,
            kernel_max_abs_err=max(g.kernel_max_abs_err for g in given),
        )
        if t.entrant is None:
            record.ok = t.case.method.startswith(PEER)  # a peer that cannot take part is a row, not our failure
        else:
            q25, q50, q75, q95 = (float(x) for x in np.percentile(times_ms, [25, 50, 75, 95]))
            record.latency_ms, record.latency_iqr_ms, record.latency_p95_ms = q50, q75 - q25, q95
            record.times_ms, record.n = times_ms, len(times_ms)
            record.attention_ms = _median_of_slowest([g.attention_ms for g in given])
            record.comm_ms = _median_of_slowest([g.communication_ms for g in given])
            error = max(g.max_abs_err for g in given)
            record.max_abs_err = error if np.isfinite(error) else None
            record.bitwise_equal = all(g.bitwise_equal for g in given)
            record.peak_mem_gib = max(g.peak_bytes for g in given) / 2**30
            record.buffer_gib = t.entrant.buffer_bytes / 2**30
            record.ok = bool(error <= bound)
            if not record.ok:
                record.status, record.error = "failed", f"wrong result: error {error:.3g} above the bound {bound:.3g}"
            record.requested_path, record.actual_path = t.entrant.requested_path, t.entrant.actual_path
            record.version, record.plan_reason = t.entrant.version, t.entrant.plan_reason
            if t.entrant.schedule is not None:
                record.schedule = t.entrant.schedule.name
                record.predicted_ms = _predicted_ms(point, t.case, t.entrant.schedule, profile)
            if t.case.cut == "auto":
                record.cut, record.prefetch = f"auto:{t.entrant.cut}", None
            if rank.first and t.timelines:
                typical = int(np.argmin(np.abs(np.array(times_ms) - q50)))  # the trace is that of the most usual call
                name = f"{number:02d}-{t.case.method}-{t.entrant.cut or 'whole'}-{point.ranks}x{point.seq_len}"
                name += f"-{point.kernel}-{point.dtype}"
                ratio = "" if point.link_ratio is None else f"-rho{point.link_ratio:g}"
                t.timelines[typical].to_chrome_trace(Path(job.folder) / "traces" / f"{name}{ratio}.json")
        found[t.case] = record
    _compare(list(found.values()))
    return list(found.values())


def _compare(records: list[Record]) -> None:
    """Fill in what one record says of another at the same point."""
    latency_ms = {
        r.method: r.latency_ms for r in records if r.method in ("ulysses", "ulysses-packed", "ring", "ceiling")
    }
    serial = next((r for r in records if r.method == "ulysses" and r.latency_ms), None)
    for r in records:
        if serial is not None and serial.latency_ms and serial.attention_ms:
            r.comm_ratio = 1 - serial.attention_ms / serial.latency_ms
        r.ceiling_ms = latency_ms.get("ceiling")
        if not r.latency_ms:
            continue
        if base_ms := latency_ms.get("ulysses"):
            r.speedup_vs_ulysses = base_ms / r.latency_ms
        if ring_ms := latency_ms.get("ring"):
            r.speedup_vs_ring = ring_ms / r.latency_ms
        packed_ms, ceiling_ms = latency_ms.get("ulysses-packed"), latency_ms.get("ceiling")
        if packed_ms and ceiling_ms and packed_ms > ceiling_ms:
            r.hidden_fraction = (packed_ms - r.latency_ms) / (packed_ms - ceiling_ms)
