"""Every schedule keeps its order, whatever the cut, and its simulated time is what the paper's arithmetic says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcms.schedule.cut import even, parse_cut
from hcms.schedule.schedule import COMM, COMPUTE, Op, Schedule, ring, serial, three_lane, two_lane
from hcms.schedule.simulate import OpCost, simulate
from hcms.schedule.timeline import Timeline

pytestmark = pytest.mark.t0

cuts = st.lists(st.integers(1, 6), min_size=1, max_size=9).map(tuple)
depths = st.none() | st.integers(1, 10)
firsts = st.sampled_from(["exchange", "return"])
pipelines = st.builds(
    lambda build, cut, depth, first: (build(cut, prefetch=depth, first=first), depth),
    st.sampled_from([two_lane, three_lane]),
    cuts,
    depths,
    firsts,
)
head_schedules = st.one_of(st.builds(serial, cuts, split_qkv=st.booleans()), pipelines.map(lambda pair: pair[0]))
schedules = head_schedules | st.integers(1, 9).map(ring)


@dataclass(frozen=True)
class TableCosts:
    """One cost an operation, as drawn."""

    table: dict[Op, OpCost]
    host_computes: bool

    def op_cost(self, op: Op, schedule: Schedule) -> OpCost:
        return self.table[op]


@dataclass(frozen=True)
class RatioCosts:
    """A serial Ulysses of one millisecond with communication ratio `rho`, on an ideal link and an idle host.

    Q, K, V and O are a quarter of the communication each, and both it and attention are proportional to the heads.
    """

    rho: float
    host_computes: bool = False

    def op_cost(self, op: Op, schedule: Schedule) -> OpCost:
        share = schedule.cut[op.chunk] / sum(schedule.cut)
        quarters = {"attend": 0, "return": 1, "exchange": len(op.tensors)}[op.kind]
        return OpCost(share * ((1 - self.rho) if op.kind == "attend" else self.rho * quarters / 4))


@dataclass(frozen=True)
class RingCosts:
    """The same layer under Ring: a rotation moves K and V of one rank's tokens, P / (P - 1) / 2 of Ulysses' time."""

    rho: float
    ranks: int
    host_computes: bool = False

    def op_cost(self, op: Op, schedule: Schedule) -> OpCost:
        if op.kind == "attend":
            return OpCost((1 - self.rho) / self.ranks)
        return OpCost(self.rho * self.ranks / (self.ranks - 1) / 2)


def ms() -> st.SearchStrategy[float]:
    return st.integers(0, 1000).map(lambda us: us / 64)  # exact in binary, so that sums are too


@st.composite
def priced(draw: st.DrawFn) -> tuple[Schedule, TableCosts]:
    schedule = draw(schedules)
    host, finish = (draw(st.booleans()) for _ in range(2))
    table = {op: OpCost(draw(ms()), draw(ms()) if host else 0.0, draw(ms()) if finish else 0.0) for op in schedule.ops}
    return schedule, TableCosts(table, draw(st.booleans()))


def indices(schedule: Schedule, kind: str) -> dict[int, int]:
    """Chunk to the index of its operation of this kind."""
    return {op.chunk: index for index, op in enumerate(schedule.ops) if op.kind == kind}


def edges(schedule: Schedule) -> dict[int, set[int]]:
    """What each operation waits for: its inputs, and the operation before it on its lane."""
    waits = {index: set(op.after) for index, op in enumerate(schedule.ops)}
    for lane in schedule.lanes:
        for before, index in pairwise(i for i, op in enumerate(schedule.ops) if op.lane == lane):
            waits[index].add(before)
    return waits


# ---- order -----------------------------------------------------------------------------------------------------------


@given(head_schedules)
def test_each_chunk_is_exchanged_attended_and_returned_once(schedule: Schedule) -> None:
    counts = Counter(
        (op.kind, op.chunk, tensor) for op in schedule.ops for tensor in op.tensors if op.kind == "exchange"
    )
    assert counts == {("exchange", chunk, tensor): 1 for chunk in range(len(schedule.cut)) for tensor in "qkv"}
    for kind in ("attend", "return"):
        assert [op.chunk for op in schedule.ops if op.kind == kind] == list(range(len(schedule.cut)))
    assert {op.kind for op in schedule.ops} == {"exchange", "attend", "return"}


@given(head_schedules)
def test_every_op_waits_for_its_inputs(schedule: Schedule) -> None:
    """By named edges alone, not by the order of a lane: a runner may use more lanes than the builder thought of."""
    reach: list[set[int]] = []
    for op in schedule.ops:
        reach.append(set(op.after).union(*(reach[earlier] for earlier in op.after)))
    attended = indices(schedule, "attend")
    for index, op in enumerate(schedule.ops):
        if op.kind == "exchange":
            assert attended[op.chunk] > index
            assert index in reach[attended[op.chunk]]
        if op.kind == "return":
            assert attended[op.chunk] in reach[index]


@given(schedules)
def test_no_cycle(schedule: Schedule) -> None:
    order = list(TopologicalSorter(edges(schedule)).static_order())
    assert sorted(order) == list(range(len(schedule.ops)))


@given(cuts, depths, firsts)
def test_attention_has_a_lane_to_itself(cut: tuple[int, ...], depth: int | None, first) -> None:
    for build, lanes in ((two_lane, 2), (three_lane, 3)):
        schedule = build(cut, prefetch=depth, first=first)
        assert {op.kind for op in schedule.ops if op.lane == COMPUTE} == {"attend"}
        assert len(schedule.lanes) == lanes
        assert schedule.overlaps
        assert schedule == build(cut, prefetch=depth, first=first), "every rank must build the same order"
    assert not serial(cut).overlaps


@given(pipelines)
def test_prefetch_is_bounded(case: tuple[Schedule, int | None]) -> None:
    schedule, depth = case
    chunks = len(schedule.cut)
    exchanged, attended = indices(schedule, "exchange"), indices(schedule, "attend")
    for chunk in range(chunks):
        after = schedule.ops[exchanged[chunk]].after
        if depth is None or chunk <= depth:
            assert after == ()
        else:
            assert after == (attended[chunk - depth - 1],)
        # The host issues no exchange later than the bound asks for either.
        ahead = chunk - (chunks if depth is None else depth)
        assert ahead <= 0 or exchanged[chunk] < attended[ahead]


def test_first_says_what_follows_a_chunk_on_the_communication_lane() -> None:
    def communication(first) -> list[str]:
        return [f"{op.kind[0]}{op.chunk}" for op in two_lane((1, 1, 1), prefetch=1, first=first).ops if op.lane == COMM]

    assert communication("exchange") == ["e0", "e1", "e2", "r0", "r1", "r2"]
    assert communication("return") == ["e0", "e1", "r0", "e2", "r1", "r2"]


@given(pipelines, st.data())
def test_chunks_in_flight_never_exceed_the_prefetch(case: tuple[Schedule, int | None], data: st.DataObject) -> None:
    schedule, depth = case
    timeline = simulate(schedule, TableCosts({op: OpCost(data.draw(ms())) for op in schedule.ops}, False))
    attended = indices(schedule, "attend")
    for span in timeline.spans:
        if span.op.kind == "exchange" and depth is not None and span.op.chunk > depth:
            assert span.begin_ms >= timeline.spans[attended[span.op.chunk - depth - 1]].end_ms


@given(st.integers(1, 9))
def test_ring_attends_to_every_share_and_overwrites_none_in_use(ranks: int) -> None:
    schedule = ring(ranks)
    attended, rotated = indices(schedule, "attend"), indices(schedule, "rotate")
    assert len(schedule.ops) == 2 * ranks - 1
    assert sorted(attended) == list(range(ranks))
    assert sorted(rotated) == list(range(ranks - 1))
    for step in range(1, ranks):
        assert rotated[step - 1] in schedule.ops[attended[step]].after
        if step < ranks - 1:
            assert {rotated[step - 1], attended[step - 1]} <= set(schedule.ops[rotated[step]].after)


def test_ulysses_is_the_schedule_with_one_chunk() -> None:
    assert [op.tensors for op in serial((5,), split_qkv=True).ops if op.kind == "exchange"] == ["q", "k", "v"]
    for one_chunk in (serial((5,)), two_lane((5,)), three_lane((5,))):
        assert [op.kind for op in one_chunk.ops] == ["exchange", "attend", "return"]


def test_chunk_starts() -> None:
    assert serial((1, 3, 1)).chunk_starts == (0, 1, 4)


@pytest.mark.parametrize("build", [two_lane, three_lane])
@pytest.mark.parametrize("prefetch", [0, -1])
def test_no_prefetch_is_refused(build: Callable[..., Schedule], prefetch: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 chunk, got {prefetch}"):
        build((1, 1), prefetch=prefetch)


@pytest.mark.parametrize("after", [(0,), (1,), (-1,)])
def test_an_op_that_waits_for_a_later_one_is_refused(after: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must come after all it waits for"):
        Schedule("broken", (1,), (Op("attend", 0, COMPUTE, after),))


@pytest.mark.parametrize("cut", [(), (0,), (2, 0, 1), (2, -1)])
def test_a_chunk_without_heads_is_refused(cut: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one head each"):
        serial(cut)


# ---- simulated time --------------------------------------------------------------------------------------------------


@given(priced())
def test_a_timeline_obeys_lanes_and_inputs(case: tuple[Schedule, TableCosts]) -> None:
    schedule, costs = case
    timeline = simulate(schedule, costs)
    assert [span.op for span in timeline.spans] == list(schedule.ops)
    for index, waits in edges(schedule).items():
        span = timeline.spans[index]
        assert span.begin_ms >= max((timeline.spans[i].end_ms for i in waits), default=0.0)
        assert span.duration_ms == costs.table[span.op].lane_ms


@given(priced())
def test_makespan_is_no_less_than_the_busiest_lane_the_critical_path_and_the_host(
    case: tuple[Schedule, TableCosts],
) -> None:
    schedule, costs = case
    duration_ms = simulate(schedule, costs).duration_ms
    for lane in schedule.lanes:
        assert duration_ms >= sum(costs.table[op].lane_ms for op in schedule.ops if op.lane == lane)
    path_ms: list[float] = []
    for op in schedule.ops:
        path_ms.append(costs.table[op].lane_ms + max((path_ms[i] for i in op.after), default=0.0))
    assert duration_ms >= max(path_ms)
    assert duration_ms >= sum(cost.host_ms + cost.finish_ms for cost in costs.table.values())


@given(priced())
def test_makespan_is_no_more_than_everything_in_a_row(case: tuple[Schedule, TableCosts]) -> None:
    schedule, costs = case
    in_a_row_ms = sum(cost.lane_ms + cost.host_ms + cost.finish_ms for cost in costs.table.values())
    assert simulate(schedule, costs).duration_ms <= in_a_row_ms


@given(cuts, depths, firsts, st.data())
def test_more_lanes_are_never_slower(cut: tuple[int, ...], depth: int | None, first, data: st.DataObject) -> None:
    cost_ms = {(kind, chunk): data.draw(ms()) for kind in ("exchange", "attend", "return") for chunk in range(len(cut))}

    def duration_ms(schedule: Schedule) -> float:
        table = {op: OpCost(cost_ms[op.kind, op.chunk]) for op in schedule.ops}
        return simulate(schedule, TableCosts(table, False)).duration_ms

    one = duration_ms(serial(cut))
    two = duration_ms(two_lane(cut, prefetch=depth, first=first))
    three = duration_ms(three_lane(cut, prefetch=depth, first=first))
    assert three <= two <= one == sum(cost_ms.values())


def test_a_host_that_computes_issues_late_what_it_unpacks() -> None:
    """One chunk: packing, the wire, unpacking, attention, the wire back, unpacking, one after the other."""
    table = {"exchange": OpCost(8, 1, 2), "attend": OpCost(16), "return": OpCost(4, 1, 2)}
    schedule = two_lane((5,))
    timeline = simulate(schedule, TableCosts({op: table[op.kind] for op in schedule.ops}, True))
    assert [(span.begin_ms, span.end_ms) for span in timeline.spans] == [(1, 9), (11, 27), (28, 32)]
    assert timeline.duration_ms == 34


# ---- the paper's arithmetic ------------------------------------------------------------------------------------------


def latency(cut: tuple[int, ...], rho: float, **kwargs) -> float:
    """Relative to serial Ulysses at 1."""
    return simulate(two_lane(cut, **kwargs), RatioCosts(rho)).duration_ms


@given(st.integers(1, 10), st.integers(1, 4), st.floats(0.001, 0.5), depths, firsts)
def test_equal_chunks_expose_the_first_exchange_and_the_last_return(
    chunks: int, heads_each: int, rho: float, depth: int | None, first
) -> None:
    cut = (heads_each,) * chunks
    assert latency(cut, rho, prefetch=depth, first=first) == pytest.approx(1 - rho + rho / chunks)


@given(cuts, st.floats(0.001, 0.999), depths, firsts)
def test_no_cut_beats_the_bound(cut: tuple[int, ...], rho: float, depth: int | None, first) -> None:
    assert latency(cut, rho, prefetch=depth, first=first) >= max(rho, 1 - rho) - 1e-12


@given(cuts, st.floats(0.001, 0.999), st.booleans())
def test_chunks_on_one_lane_gain_nothing(cut: tuple[int, ...], rho: float, split_qkv: bool) -> None:
    assert simulate(serial(cut, split_qkv=split_qkv), RatioCosts(rho)).duration_ms == pytest.approx(1)


@pytest.mark.parametrize(
    ("heads", "rho", "cut", "speedup"),
    [
        (10, 0.20, "even:2", 1.11),
        (10, 0.20, "even:5", 1.19),
        (10, 0.20, "1-2-4-1-1-1", 1.22),
        (5, 0.25, "even:5", 1.25),
        (5, 0.25, "1-3-1", 1.25),
        (8, 0.20, "even:4", 1.18),
    ],
)
def test_quoted_speedups(heads: int, rho: float, cut: str, speedup: float) -> None:
    assert round(1 / latency(parse_cut(cut, heads), rho), 2) == speedup


def ring_latency(ranks: int, rho: float) -> float:
    return simulate(ring(ranks), RingCosts(rho, ranks)).duration_ms


@given(st.integers(2, 16), st.floats(0.001, 0.999))
def test_ring_closed_form(ranks: int, rho: float) -> None:
    attention, communication = 1 - rho, rho
    expected = attention / ranks + max(attention * (ranks - 1) / ranks, communication * ranks / 2)
    assert ring_latency(ranks, rho) == pytest.approx(expected)


@pytest.mark.parametrize(("ranks", "hidden_up_to"), [(2, 1 / 3), (4, 0.27), (8, 0.18)])
def test_ring_hides_everything_up_to(ranks: int, hidden_up_to: float) -> None:
    below, above = round(hidden_up_to, 2) - 0.005, round(hidden_up_to, 2) + 0.005
    assert ring_latency(ranks, below) == pytest.approx(1 - below)
    assert ring_latency(ranks, above) > (1 - above) * 1.001


def test_ring_falls_behind_on_a_slow_link() -> None:
    attention = 1 - 0.25
    assert round(ring_latency(8, 0.25) / attention, 2) == 1.46
    assert round(latency(even(5, 5), 0.25) / attention, 2) == 1.07


# ---- the timeline's own figures --------------------------------------------------------------------------------------


def test_timeline_counts_overlapping_communication_once() -> None:
    schedule = three_lane((1, 1))
    cost = {
        ("exchange", 0): 2,
        ("exchange", 1): 10,
        ("attend", 0): 3,
        ("attend", 1): 1,
        ("return", 0): 4,
        ("return", 1): 1,
    }
    costs = TableCosts({op: OpCost(cost[op.kind, op.chunk]) for op in schedule.ops}, False)
    timeline = simulate(schedule, costs)
    # Exchanges hold 0-12; the first return, 5-9, lies inside; attention 12-13; the last return 13-14.
    assert timeline.communication_ms == 13
    assert timeline.attention_ms == 4
    assert timeline.duration_ms == 14
    assert timeline.source == "predicted"


def test_chrome_trace(tmp_path) -> None:
    import json

    timeline: Timeline = simulate(two_lane((1, 3, 1)), RatioCosts(0.25))
    path = tmp_path / "new" / "trace.json"
    timeline.to_chrome_trace(path, rank=1)
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert set(lanes) == {COMPUTE, COMM}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(timeline.spans) == 9
    assert all(event["pid"] == 1 for event in events)
    assert spans[0] | {"args": None} == {
        "ph": "X", "name": "exchange 0", "cat": "predicted", "pid": 1, "tid": lanes[COMM], "ts": 0.0,
        "dur": pytest.approx(0.25 * 3 / 4 / 5 * 1e3), "args": None,
    }  # fmt: skip
