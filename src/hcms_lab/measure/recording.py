"""What a contestant's rounds come to: one record a case, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from hcms.methods import METHODS
from hcms.schedule.cost import Workload, WorkloadCosts, predict
from hcms.schedule.profile import Profile
from hcms.schedule.schedule import Schedule
from hcms.schedule.timeline import Timeline
from hcms.transport import COLLECTIVE
from hcms_lab.ground import traces
from hcms_lab.ground.names import PEER
from hcms_lab.ground.records import Record
from hcms_lab.measure.cases import Case, Point
from hcms_lab.measure.contestant import Contestant
from hcms_lab.measure.inputs import Reference
from hcms_lab.measure.job import SUSTAINED, Job
from hcms_lab.measure.launch import Rank
from hcms_lab.measure.timing import Sample, gathered


@dataclass
class Timed:
    """A contestant and what its rounds gave on this rank."""

    case: Case
    entrant: Contestant | None = None
    error: str | None = None
    status: str = "done"
    calls: int = 1  # in a block
    samples: list[Sample] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    communication_ms: list[float] = field(default_factory=list)
    max_abs_err: float = 0.0
    bitwise_equal: bool = True
    wrong_bytes: int = 0
    peak_bytes: int = 0
    timelines: list[Timeline] = field(default_factory=list)


def _record(job: Job, point: Point, case: Case, **fields: Any) -> Record:
    """What a case's record says whatever came of it."""
    exchanges_heads = case.method in METHODS and METHODS[case.method].program != "ring"
    return Record(
        exp=job.exp,
        hardware=job.hardware,
        workload=point.workload,
        link=job.link,
        transport=job.transport if exchanges_heads and job.transport != COLLECTIVE else None,
        link_ratio=point.link_ratio,
        load=job.load,
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


def refused(job: Job, point: Point, case: Case, why: str) -> Record:
    """A point of a sweep that this machine cannot offer is a row, not the end of the sweep."""
    return _record(job, point, case, status="refused", error=why)


class _Given(NamedTuple):
    """What one rank measured of one case."""

    samples: list[Sample]
    attention_ms: list[float]
    communication_ms: list[float]
    max_abs_err: float
    bitwise_equal: bool
    wrong_bytes: int
    peak_bytes: int
    bound: float
    kernel_max_abs_err: float


def _median_of_slowest(values_by_rank: list[list[float]]) -> float | None:
    """The median over rounds of the slowest rank's value."""
    return float(median(map(max, zip(*values_by_rank, strict=True)))) if values_by_rank and values_by_rank[0] else None


def _median(values: list[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return float(median(there)) if there else None


def recorded(
    rank: Rank,
    job: Job,
    point: Point,
    gbps: float | None,
    timed: list[Timed],
    references: list[Reference],
    profile: Profile | None,
) -> list[Record]:
    """The records of a point's cases. Collective."""
    bound = max(r.bound for r in references)
    plain_error = max(r.kernel_max_abs_err for r in references)
    records: list[Record] = []
    for t in timed:
        given: list[_Given] = gathered(
            rank,
            _Given(
                t.samples, t.attention_ms, t.communication_ms, t.max_abs_err, t.bitwise_equal, t.wrong_bytes,
                t.peak_bytes, bound, plain_error,
            ),
        )  # fmt: skip
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
            _fill(record, t, t.entrant, given)
            predicted = None
            if t.entrant.schedule is not None and profile is not None:
                predicted = _predicted(job, point, t.entrant.schedule, profile)
                record.predicted_ms = predicted.duration_ms
            elif t.case.method == "ceiling" and profile is not None:
                hot = 1.0 if job.load == SUSTAINED else 0.0
                record.predicted_ms = profile.attention_ms(point.seq_len, point.heads_a_rank, point.batch, hot=hot)
            if rank.first and t.timelines and record.ok:
                _trace(job, t, record)
                if predicted is not None:
                    traces.write(predicted, Path(job.folder), record)
        records.append(record)
    _compare(records)
    return records


def _fill(record: Record, t: Timed, entrant: Contestant, given: list[_Given]) -> None:
    """What was measured, if it is right: a wrong result has no time."""
    error = max(g.max_abs_err for g in given)
    wrong_bytes, bound = sum(g.wrong_bytes for g in given), max(g.bound for g in given)
    record.max_abs_err = error if np.isfinite(error) else None
    record.bitwise_equal = all(g.bitwise_equal for g in given)
    record.ok = bool(error <= bound) and not wrong_bytes
    record.requested_path, record.actual_path = entrant.requested_path, entrant.actual_path
    record.version, record.plan_reason = entrant.version, entrant.plan_reason
    record.schedule = entrant.schedule.name if entrant.schedule is not None else None
    if t.case.cut == "auto":
        record.cut, record.prefetch = f"auto:{entrant.cut}", None
    if not record.ok:
        why = f"error {error:.3g} above the bound {bound:.3g}" if error > bound else f"{wrong_bytes} bytes left wrong"
        record.status, record.error = "failed", f"wrong result: {why}"
        return
    times_ms = [float(max(s.ms for s in samples)) for samples in zip(*(g.samples for g in given), strict=True)]
    q25, q50, q75, q95 = (float(x) for x in np.percentile(times_ms, [25, 50, 75, 95]))
    record.latency_ms, record.latency_iqr_ms, record.latency_p95_ms = q50, q75 - q25, q95
    record.times_ms, record.n = times_ms, len(times_ms)
    record.attention_ms = _median_of_slowest([g.attention_ms for g in given])
    record.comm_ms = _median_of_slowest([g.communication_ms for g in given])
    mine = given[0].samples
    record.host_ms = _median([s.host_ms for s in mine])
    record.sm_clock_mhz, record.power_w = _median([s.sm_clock_mhz for s in mine]), _median([s.power_w for s in mine])
    record.peak_mem_gib = max(g.peak_bytes for g in given) / 2**30
    record.buffer_gib = entrant.buffer_bytes / 2**30


def _trace(job: Job, t: Timed, record: Record) -> None:
    """The timeline of the most usual round, as a Chrome trace."""
    assert record.times_ms is not None and t.entrant is not None
    typical = int(np.argmin(np.abs(np.array(record.times_ms) - record.latency_ms)))
    traces.write(t.timelines[typical], Path(job.folder), record)


def _predicted(job: Job, point: Point, schedule: Schedule, profile: Profile) -> Timeline:
    workload = Workload(point.seq_len, point.heads, point.ranks, point.head_dim, point.batch, point.dtype)
    sustained = job.load == SUSTAINED
    return predict(schedule, WorkloadCosts(profile, workload, graph=job.graph == "auto", sustained=sustained))


LEAST_TO_HIDE = 0.02  # of packed Ulysses


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
        # Next to no communication is noise, and no share of it says anything.
        if packed_ms and ceiling_ms and packed_ms - ceiling_ms > LEAST_TO_HIDE * packed_ms:
            r.hidden_fraction = (packed_ms - r.latency_ms) / (packed_ms - ceiling_ms)
