"""Plans worth timing: the fastest few by prediction of the methods that are asked for, and both Ulysses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from hcms.methods import METHODS
from hcms.schedule.cost import predict
from hcms.schedule.cut import Cut, tapered, usual_cuts
from hcms.schedule.plan import Plan, Setting
from hcms.schedule.simulate import Costs

BASELINES = ("ulysses", "ulysses-packed")
_MOST_CHUNKS = 8
_PARTS = (1, 2, 3, 4)
_PROVEN = 5  # chunks, tapered, ends in two parts, on two lanes: best or next to it wherever it was measured


def shortlist(
    costs: Costs, heads_a_rank: int, setting: Setting, methods: Iterable[str], *, most: int = 3
) -> list[Plan]:
    """Both Ulysses, then at most `most` chunked plans by predicted time, and one that did well before, with and
    without SMs kept for communication where they may be.

    Of plans with one cut only the best few ends would be listed; so each cut is listed once, as its best.
    """
    methods = tuple(methods)
    whole = (heads_a_rank,)
    fastest: dict[Cut, tuple[float, Plan]] = {}
    for name in methods:
        for plan in _plans(name, heads_a_rank, setting.comm_sms):
            ms = predict(METHODS[name].build(plan, setting), costs).duration_ms
            if plan.cut not in fastest or ms < fastest[plan.cut][0]:
                fastest[plan.cut] = (ms, plan)
    by_time = sorted(fastest.values(), key=lambda timed: timed[0])
    proven = [
        Plan(name, tapered(heads_a_rank, _PROVEN), ends=(2, 2), fill=True, comm_sms=sms)
        for name in methods
        if METHODS[name].thins and heads_a_rank >= _PROVEN
        for sms in (0, *setting.comm_sms[:1])
    ]
    # How fast the link is with few blocks is not known: the best is tried with and without SMs kept.
    best = [plan for _, plan in by_time[:1] if METHODS[plan.method].thins]
    twins = [replace(plan, comm_sms=sms) for plan in best for sms in (0, *setting.comm_sms[:1])]
    chunked = dict.fromkeys([*(plan for _, plan in by_time[:most]), *twins, *proven])
    return [*(Plan(name, whole) for name in BASELINES), *chunked]


def _plans(name: str, heads: int, comm_sms: tuple[int, ...] = ()) -> Iterator[Plan]:
    """The plans of a method that are tried: even and tapered cuts; where it has them thin ends, two lanes and SMs kept
    for communication."""
    for cut in usual_cuts(heads, _MOST_CHUNKS):
        if not METHODS[name].thins:
            yield Plan(name, cut)
            continue
        for parts, sms in product(_PARTS, (0, *comm_sms)):
            for fill in (False, True) if len(cut) > 1 or parts > 1 else (False,):
                yield Plan(name, cut, ends=(parts, parts), fill=fill, comm_sms=sms)
