"""Decide between plans by timing them on the ranks that will run them: never slower is then measured, not hoped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from hcms.objects import everyones, firsts
from hcms.schedule.plan import Plan
from hcms.shortlist import BASELINES

ROUNDS = 3
MARGIN = 0.01  # as a prediction has to gain (`choose`)
_ROUND_MS = 80.0  # back-to-back calls of a plan; the first half is not timed: a graph's first replays load it
_FEWEST, _MOST = 3, 24


@dataclass(frozen=True)
class Raced:
    """The winner, and what every plan took, in ms of the slowest rank: medians over rounds."""

    winner: Plan
    times_ms: dict[Plan, float]
    reason: str


def race(
    group: dist.ProcessGroup,
    calls: Sequence[tuple[Plan, Callable[[], object]]],
    prepare: Callable[[Plan], None] = lambda plan: None,
) -> Raced:
    """Time plans in interleaved rounds on CUDA; rank 0's word is everybody's. Collective.

    Args:
        calls: each plan with a call of it that is warm.
        prepare: what the link asks for before a plan's calls of a round.
    """
    times_ms: dict[Plan, list[float]] = {plan: [] for plan, _ in calls}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    calls[0][1]()
    end.record()
    end.synchronize()
    slowest_ms = max(everyones(begin.elapsed_time(end), group))
    count = min(_MOST, max(_FEWEST, round(_ROUND_MS / max(slowest_ms, 1e-3))))
    for turn in range(ROUNDS):
        for k in range(len(calls)):
            plan, call = calls[(turn + k) % len(calls)]
            prepare(plan)
            torch.cuda.synchronize()
            dist.barrier(group)
            for i in range(count):
                if i == count // 2:
                    begin.record()
                call()
            end.record()
            end.synchronize()
            times_ms[plan].append(begin.elapsed_time(end) / (count - count // 2))
    by_rank = everyones(list(times_ms.values()), group)
    slowest = {plan: [max(r[i][turn] for r in by_rank) for turn in range(ROUNDS)] for i, plan in enumerate(times_ms)}
    return firsts(decide(slowest), group)


def decide(times_ms: dict[Plan, list[float]]) -> Raced:
    """The fastest plan if it beats the faster Ulysses beyond noise: in most rounds, and by more than the margin.

    The rounds that say which plan is fastest also say by how much, so of plans that are alike one looks faster.
    """
    medians = {plan: float(median(ms)) for plan, ms in times_ms.items()}
    base = min((p for p in medians if p.method in BASELINES), key=lambda p: medians[p])
    best = min(medians, key=lambda p: medians[p])
    gain = medians[base] / medians[best] - 1
    wins = sum(a < b for a, b in zip(times_ms[best], times_ms[base], strict=True))
    if best.method in BASELINES or 2 * wins <= len(times_ms[best]) or gain <= MARGIN:
        return Raced(base, medians, f"{base.method}: no chunked plan was faster beyond noise in {ROUNDS} rounds")
    text = f"{best.method} {best.shape}: timed {medians[best]:.4g} ms, {gain:.1%} faster than {base.method}"
    return Raced(best, medians, f"{text} ({medians[base]:.4g} ms), of {len(medians)} plans in {ROUNDS} rounds")
