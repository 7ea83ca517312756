"""A record a method, of what its clips gave on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean, median
from typing import Any

import numpy as np

from hcms.clip import ClipShape
from hcms.transport import COLLECTIVE
from hcms_lab.ground.clip_record import ClipRecord, against_ulysses, of_clip
from hcms_lab.measure.cases import Point
from hcms_lab.measure.contestant import cut_of, path_of
from hcms_lab.measure.launch import Rank
from hcms_lab.measure.timing import gathered
from hcms_lab.measure.wan.breakdown import DENOISING, PARTS
from hcms_lab.measure.wan.clip_job import TOLERANCE, ClipJob, Entrant, Seen

Mark = Callable[[ClipRecord, list[Seen], list[int]], None]


def recorded(
    rank: Rank,
    clip_job: ClipJob,
    point: Point,
    clip: ClipShape,
    gbps: float | None,
    entrants: list[Entrant],
    mark: Mark | None = None,
) -> list[ClipRecord]:
    """The records of one length, compared with each other. Collective: every rank returns the same.

    Args:
        mark: says more of each record, of what every rank saw and which rank was the slowest in each clip.
    """
    job, model = clip_job.job, clip_job.model
    found: list[ClipRecord] = []
    for e in entrants:
        by_rank: list[Seen] = gathered(rank, e.seen)
        # Each clip as its slowest rank saw it, so that parts and whole belong together.
        count = len(e.seen.totals_ms)
        slowest = [max(range(rank.ranks), key=lambda r: by_rank[r].totals_ms[i]) for i in range(count)]
        totals = [by_rank[r].totals_ms[i] for i, r in enumerate(slowest)]
        parts = [by_rank[r].parts_ms[i] for i, r in enumerate(slowest)]
        by_step = list(zip(*(by_rank[r].steps_ms[i] for i, r in enumerate(slowest)), strict=True))
        q25, q50, q75, q95 = (float(x) for x in np.percentile(totals, [25, 50, 75, 95]))
        # The clip in the middle (or the two whose mean the median is), so that its parts add up to latency_ms.
        middle = sorted(range(len(totals)), key=totals.__getitem__)[(len(totals) - 1) // 2 : len(totals) // 2 + 1]
        of_middle: dict[str, Any] = {name: mean(parts[i][name] for i in middle) for name in PARTS}
        plain_errors = [b.plain_max_abs_err for b in by_rank if b.plain_max_abs_err is not None]
        equal, frames_equal = all(b.latents_equal for b in by_rank), [b.frames_equal for b in by_rank]
        error = max(b.max_abs_err for b in by_rank)
        wrong = _wrong(e.case.method, model.dtype, by_rank)
        schedule, cut = e.attention.schedule, cut_of(e.attention)
        found.append(
            ClipRecord(
                exp=job.exp,
                status="failed" if wrong else "done",
                error=f"wrong result: {wrong}" if wrong else None,
                ok=wrong is None,
                hardware=job.hardware,
                workload=model.name,
                link=job.link,
                transport=e.attention.transport if e.attention.transport != COLLECTIVE else None,
                link_ratio=point.link_ratio,
                link_gbps=gbps,
                world_size=rank.ranks,
                method=e.case.method,
                kernel=point.kernel,
                dtype=model.dtype,
                batch=1,
                seq_len=clip.tokens,
                heads=point.heads,
                head_dim=point.head_dim,
                cut=f"auto:{cut}" if e.case.cut == "auto" else e.case.cut,
                schedule=schedule.name if schedule is not None else None,
                comm_ratio=_median(b.comm_ratio for b in by_rank) if e.case.method == "ulysses" else None,
                latency_ms=q50,
                latency_iqr_ms=q75 - q25,
                latency_p95_ms=q95,
                times_ms=totals,
                n=len(totals),
                warmup=job.warmup,
                peak_mem_gib=max(b.peak_bytes for b in by_rank) / 2**30 or None,
                buffer_gib=e.attention.buffer_bytes / 2**30,
                max_abs_err=error if np.isfinite(error) else None,
                bitwise_equal=equal and all(x is not False for x in frames_equal),
                requested_path="/".join(x for x in (e.case.method, e.case.cut, point.kernel) if x),
                actual_path=path_of(e.attention),
                plan_reason=e.attention.plan_reason,
                predicted_ms=None,
                seed=job.seed,
                prefetch=e.case.prefetch,
                ranks_per_core=job.ranks_per_core,
                weights="random" if clip_job.source is None else "pretrained",
                sharding=clip_job.sharding,
                **of_clip(model, clip),
                **{f"{name}_ms": ms for name, ms in of_middle.items()},
                named_share=1 - of_middle["other"] / q50,
                self_attention_share=median(p["self_attention"] / t for p, t in zip(parts, totals, strict=True)),
                self_attention_times_ms=[p["self_attention"] for p in parts],
                attention_layer_times_ms=[p["self_attention"] + p["self_projections"] for p in parts],
                step_times_ms=[median(sum(s[part] for part in DENOISING) for s in step) for step in by_step],
                self_attention_by_step_ms=[median(s["self_attention"] for s in step) for step in by_step],
                latents_equal=equal,
                frames_equal=all(frames_equal) if None not in frames_equal else None,
                plain_max_abs_err=max(plain_errors) if plain_errors and np.isfinite(plain_errors).all() else None,
                plain_bitwise_equal=all(b.plain_bitwise_equal for b in by_rank) if plain_errors else None,
            )
        )
        if mark is not None:
            mark(found[-1], by_rank, slowest)
    against_ulysses(found, job.seed)
    return found


def mark_composed(clip_job: ClipJob, load: str | None, r: ClipRecord, by_rank: list[Seen], slowest: list[int]) -> None:
    """Say of a record of composed clips what they are composed of."""
    r.composed, r.load = True, load
    r.steps_timed, r.experts_timed, r.forwards_a_step = r.n, 1, clip_job.forwards_a_step
    r.layers_timed = clip_job.layers_timed
    # Each timed step as its slowest rank saw it; the clips' parts hold `steps` of them.
    steps = [by_rank[rank].steps_ms[i][0] for i, rank in enumerate(slowest)]
    r.step_times_ms = [sum(step.values()) for step in steps]
    r.self_attention_by_step_ms = [step["self_attention"] for step in steps]
    r.host_ms = max(median(b.host_ms) for b in by_rank)
    r.host_ahead_ms = min(min(b.ahead_ms) for b in by_rank)
    r.replayed_share = sum(b.replayed for b in by_rank) / max(1, sum(b.calls for b in by_rank))
    r.layer_comm_ratio = _median(b.layer_comm_ratio for b in by_rank)
    r.wrong_bytes = max(b.wrong_bytes for b in by_rank)
    for name in ("sm_clock_mhz", "power_w"):
        setattr(r, name, _median(seen.get(name) for b in by_rank for seen in b.sensors))


def _wrong(method: str, dtype: str, by_rank: list[Seen]) -> str | None:
    """What is wrong with a method's results on any rank, if anything is."""
    off_plain, worst = max(b.plain_worst for b in by_rank), max(b.worst for b in by_rank)
    if off_plain > TOLERANCE[dtype]:
        return f"{off_plain:.3g} of the largest latent away from the unchanged pipeline"
    if not (all(b.latents_equal for b in by_rank) if method != "ring" else worst <= TOLERANCE[dtype]):
        return f"{worst:.3g} of the largest latent away from ulysses"
    if lost := max(b.wrong_bytes for b in by_rank):
        return f"{lost} of the bytes that left were not what should have"
    return next((b.wrong for b in by_rank if b.wrong), None)


def _median(values: Iterable[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return median(known) if known else None
