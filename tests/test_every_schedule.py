"""What every method of the table owes: inputs come first, ranks meet in one order, no two ranks
wait for each other in any interleaving, and no more chunks are alive than there are buffers for.

New methods and kinds of operations are covered by being registered. Nothing here runs a schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcms.methods import METHODS
from hcms.schedule.plan import Plan, Setting
from hcms.schedule.schedule import COMM, COMPUTE, Op, Schedule

pytestmark = pytest.mark.t0

MEETINGS = ("exchange", "return", "rotate")  # operations of which every rank has its own part
WAY = ("pack", "exchange", "attend", "return", "unpack")  # a chunk's, in this order


def built(
    name: str,
    cut: tuple[int, ...],
    ranks: int,
    prefetch: int | None,
    first: Any,
    ends: tuple[int, int] = (1, 1),
    fill: bool = False,
    on_host: bool = False,
) -> Schedule:
    method = METHODS[name]
    cut = cut if method.cuts else (sum(cut),)
    thin: dict[str, Any] = {"ends": ends, "fill": fill} if method.thins else {}
    return method.build(Plan(name, cut, prefetch, first, **thin), Setting(ranks, on_host))


cuts = st.lists(st.integers(1, 4), min_size=1, max_size=7).map(tuple)
schedules = st.builds(
    built,
    st.sampled_from(sorted(METHODS)),
    cuts,
    st.integers(2, 8),
    st.none() | st.integers(1, 5),
    st.sampled_from(["exchange", "return"]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.booleans(),
    st.booleans(),
)


def waits(schedule: Schedule) -> list[set[int]]:
    """What each operation waits for: what it names, and what is before it on its lane."""
    found = [set(op.after) for op in schedule.ops]
    for lane in schedule.lanes:
        for before, index in pairwise(i for i, op in enumerate(schedule.ops) if op.lane == lane):
            found[index].add(before)
    return found


def ancestors(schedule: Schedule) -> list[set[int]]:
    reach: list[set[int]] = []
    for direct in waits(schedule):
        reach.append(direct.union(*(reach[earlier] for earlier in direct)))
    return reach


def part(op: Op) -> int | None:
    """Which part of its chunk an operation is of; None is the whole, as packing always is."""
    return None if op.part[1] == 1 or op.kind == "pack" else op.part[0]


def of_one_part(one: Op, other: Op) -> bool:
    return None in (part(one), part(other)) or part(one) == part(other)


def feeds(early: Op, late: Op) -> bool:
    """Whether `late` needs what `early` gives."""
    if early.chunk != late.chunk or not of_one_part(early, late):
        return False
    if early.kind not in WAY or late.kind not in WAY or WAY.index(early.kind) >= WAY.index(late.kind):
        return False
    towards_attention = WAY.index(late.kind) < WAY.index("attend")
    return not towards_attention or bool(set(early.tensors) & set(late.tensors))


# ---- inputs ----------------------------------------------------------------------------------------------------------


@given(schedules)
def test_every_operation_comes_after_its_inputs(schedule: Schedule) -> None:
    reach = ancestors(schedule)
    for (i, early), (j, late) in product(enumerate(schedule.ops), repeat=2):
        if feeds(early, late):
            assert i in reach[j], f"{late.kind} {late.chunk} may run before {early.kind} {early.chunk}"


@given(schedules)
def test_every_chunk_goes_the_whole_way(schedule: Schedule) -> None:
    if any(op.kind == "rotate" for op in schedule.ops):
        steps = range(len(schedule.cut))
        assert sorted(op.chunk for op in schedule.ops if op.kind == "attend") == list(steps)
        assert sorted(op.chunk for op in schedule.ops if op.kind == "rotate") == list(steps)[:-1]
        return
    for chunk in range(len(schedule.cut)):
        own = [op for op in schedule.ops if op.chunk == chunk]
        attended = [op for op in own if op.kind == "attend"]
        assert sorted(op.part for op in attended) == [(i, len(attended)) for i in range(len(attended))]
        for attend in attended:
            arrived = [op.tensors for op in own if op.kind == "exchange" and of_one_part(op, attend)]
            assert sorted("".join(arrived)) == sorted("qkv")
            for kind in ("return", "unpack") if schedule.copies_apart else ("return",):
                assert sum(op.kind == kind and of_one_part(op, attend) for op in own) == 1


@given(schedules)
def test_a_rotation_overwrites_nothing_that_is_still_read(schedule: Schedule) -> None:
    """K and V of step t lie in buffer t mod 2 from rotation t - 1 on, read by attention t and rotation t."""
    where = {(op.kind, op.chunk): i for i, op in enumerate(schedule.ops)}
    reach = ancestors(schedule)
    for (kind, step), index in where.items():
        if kind == "rotate" and step > 0:
            assert where["rotate", step - 1] in reach[index]
            assert where["attend", step - 1] in reach[index]
        if kind == "attend" and step > 0 and ("rotate", step - 1) in where:
            assert where["rotate", step - 1] in reach[index]


# ---- ranks -----------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(METHODS)),
    cuts,
    st.integers(2, 8),
    st.none() | st.integers(1, 5),
    st.sampled_from(["exchange", "return"]),
)
def test_every_rank_builds_the_same_order(name: str, cut: tuple[int, ...], ranks: int, prefetch, first) -> None:
    """From the plan alone: ranks that each build their own meet in one order on every lane."""
    one, other = (built(name, cut, ranks, prefetch, first) for _ in range(2))
    assert one == other
    for lane in one.lanes:
        assert [o for o in one.ops if o.lane == lane] == [o for o in other.ops if o.lane == lane]


class Stuck(AssertionError):
    """Ranks wait for each other for ever, or meet in different operations."""


State = tuple[tuple[int, ...], ...]  # of each rank, how many operations of each lane have ended


def reached(by_rank: list[Schedule]) -> Iterator[list[set[int]]]:
    """Every state that ranks can come to, as the operations of each that have ended; every interleaving leads by these.

    Lanes are first in, first out. What is computed ends when it likes; ranks meet on a lane when each has come to that
    operation, and it ends on all of them.

    Raises:
        Stuck: a state that is not the end and has no next, or a lane on which ranks meet in different operations.
    """
    lanes = by_rank[0].lanes
    queues = [[[i for i, op in enumerate(s.ops) if op.lane == lane] for lane in lanes] for s in by_rank]
    start: State = tuple(tuple(0 for _ in lanes) for _ in by_rank)
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        ended = [
            {i for queue, n in zip(queues[r], counts, strict=True) for i in queue[:n]} for r, counts in enumerate(state)
        ]
        yield ended
        following: set[State] = set()
        for at, _ in enumerate(lanes):
            heads = [
                queues[r][at][state[r][at]] if state[r][at] < len(queues[r][at]) else None for r in range(len(by_rank))
            ]
            ready = [head is not None and set(by_rank[r].ops[head].after) <= ended[r] for r, head in enumerate(heads)]
            ops = [None if head is None else by_rank[r].ops[head] for r, head in enumerate(heads)]
            for r, op in enumerate(ops):
                if op is not None and op.kind not in MEETINGS and ready[r]:
                    following.add(_moved(state, at, [r]))
            if all(op is not None and op.kind in MEETINGS for op in ops) and all(ready):
                if len({replace(op, after=()) for op in ops if op is not None}) > 1:
                    raise Stuck(f"ranks meet in different operations on lane {lanes[at]}")
                following.add(_moved(state, at, range(len(by_rank))))
        if not following and any(len(e) < len(s.ops) for e, s in zip(ended, by_rank, strict=True)):
            raise Stuck("ranks wait for each other")
        todo += following - seen
        seen |= following


def _moved(state: State, lane: int, ranks: range | list[int]) -> State:
    return tuple(
        tuple(n + (r in ranks and at == lane) for at, n in enumerate(counts)) for r, counts in enumerate(state)
    )


def cuts_of(heads: int, most_chunks: int) -> list[tuple[int, ...]]:
    """Every way to cut so many heads into ordered chunks."""
    return [
        cut
        for chunks in range(1, most_chunks + 1)
        for cut in product(range(1, heads + 1), repeat=chunks)
        if sum(cut) == heads
    ]


SMALL = [
    (name, cut, prefetch, first)
    for name, method in METHODS.items()
    for cut in (cuts_of(4, most_chunks=3) if method.cuts else [(2,)])
    for prefetch in ([None, 1, 2] if method.cuts else [None])
    for first in (["exchange", "return"] if method.cuts else ["exchange"])
]


def alive(schedule: Schedule, ended: set[int]) -> set[int]:
    """The chunks that hold a buffer: something of them may be arriving, or waits to be attended to.

    Of a ring the steps whose K and V are arriving, or wait to be attended to or passed on.
    """
    before = waits(schedule)
    begun = {i for i, needs in enumerate(before) if i in ended or needs <= ended}
    turning = any(op.kind == "rotate" for op in schedule.ops)
    found: set[int] = set()
    for i, op in enumerate(schedule.ops):
        if turning and op.kind == "rotate" and i in begun:
            found |= {op.chunk, op.chunk + 1} if i not in ended else {op.chunk + 1}
        if not turning and op.kind in ("pack", "exchange") and i in begun:
            found.add(op.chunk)
    return found - {
        chunk
        for chunk in found
        if all(
            i in ended
            for i, op in enumerate(schedule.ops)
            if op.chunk == chunk and op.kind in ("pack", "exchange", "attend", "rotate")
        )
    }


def owned(schedule: Schedule, prefetch: int | None) -> int:
    """Two for a ring; else a region a chunk, and no more of them in use than a prefetch that is honoured lets."""
    if any(op.kind == "rotate" for op in schedule.ops):
        return 2
    chunks = len(schedule.cut)
    return chunks if prefetch is None or schedule.copies_apart else min(chunks, prefetch + 1)


@pytest.mark.parametrize("name", METHODS)
def test_no_interleaving_gets_stuck_or_needs_more_buffers_than_there_are(name: str) -> None:
    """Exhaustive: two ranks, up to three chunks of four heads, every depth and order; of a ring up to four steps."""
    cases = states = 0
    for case, cut, prefetch, first in SMALL:
        for ranks in (2, 3, 4) if case == "ring" else (2,):
            if case != name:
                continue
            schedule = built(case, cut, ranks, prefetch, first)
            cases += 1
            for ended in reached([schedule, schedule]):
                states += 1
                for of_rank in ended:
                    assert len(alive(schedule, of_rank)) <= owned(schedule, prefetch)
    assert cases > 0
    assert states > cases


def test_ranks_of_different_orders_get_stuck() -> None:
    """The check itself: two ranks that return and exchange in different orders on one lane."""
    one, other = (built("hcms", (1, 1, 1), 2, 1, first) for first in ("exchange", "return"))
    with pytest.raises(Stuck):
        list(reached([one, other]))


def test_a_lane_that_waits_for_what_is_behind_it_gets_stuck() -> None:
    """Rank 0 attends before it sends, rank 1 sends before it attends, and each attention waits for an exchange."""
    exchange, attend = Op("exchange", 0, COMM), Op("attend", 0, COMPUTE)
    one = Schedule("waits", (1,), (exchange, replace(attend, after=(0,))))
    other = Schedule("never sends", (1,), (attend, Op("exchange", 0, COMPUTE, (0,))))
    with pytest.raises(Stuck):
        list(reached([replace(one, ops=(attend, replace(exchange, lane=COMPUTE))), replace(other, ops=(attend,))]))


def test_too_few_buffers_would_be_found() -> None:
    """Without the edge that bounds it, a pipeline of depth 1 has three chunks alive."""
    schedule = built("hcms", (1, 1, 1), 2, 1, "exchange")
    unbound = replace(schedule, ops=tuple(replace(o, after=()) if o.kind == "exchange" else o for o in schedule.ops))
    assert max(len(alive(unbound, e)) for states in reached([unbound, unbound]) for e in states) == 3
    assert max(len(alive(schedule, e)) for states in reached([schedule, schedule]) for e in states) == 2


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.overlaps and m.cuts])
def test_a_missing_edge_to_an_input_would_be_found(name: str) -> None:
    """Every edge that leads from a chunk's exchange to its attention, or on to its return, is needed."""
    schedule = built(name, (1, 1, 1), 2, None, "exchange")
    for index, op in enumerate(schedule.ops):
        for cut_off in op.after:
            if not feeds(schedule.ops[cut_off], op) or schedule.ops[cut_off].lane == op.lane:
                continue
            weaker = replace(op, after=tuple(x for x in op.after if x != cut_off))
            broken = replace(schedule, ops=(*schedule.ops[:index], weaker, *schedule.ops[index + 1 :]))
            assert cut_off not in ancestors(broken)[index]
