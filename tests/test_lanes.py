"""Lanes keep a schedule's order, and communication really runs while attention does."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path
from time import sleep
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.kernels import Kernel
from hcms.lanes.cpu import CpuLanes
from hcms.links import emulated
from hcms.programs.ulysses import UlyssesProgram
from hcms.schedule.schedule import COMM, COMM_OUT, COMPUTE, Op, Schedule, ring, serial, three_lane, two_lane
from hcms.schedule.timeline import Timeline
from hcms.transport.layout import HeadExchange, LayerShape
from ranks import Place, new_group, on_ranks, own, whole_qkv

pytestmark = pytest.mark.t1

cuts = st.lists(st.integers(1, 3), min_size=1, max_size=7).map(tuple)
pipelines = st.builds(
    lambda build, cut, depth, first: build(cut, prefetch=depth, first=first),
    st.sampled_from([two_lane, three_lane]),
    cuts,
    st.none() | st.integers(1, 8),
    st.sampled_from(["exchange", "return"]),
)
schedules = pipelines | st.builds(serial, cuts, split_qkv=st.booleans()) | st.integers(1, 7).map(ring)


class LoggedWork(dist.Work):
    def __init__(self, log: list[Any], index: int) -> None:
        super().__init__()
        self._log, self._index = log, index

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._log.append(("wait", self._index))
        return True


class LoggedProgram:
    """Does nothing and writes down when it was asked to."""

    def __init__(self, schedule: Schedule) -> None:
        self._indices = {op: i for i, op in enumerate(schedule.ops)}
        self.log: list[Any] = []
        self.groups: dict[int, object] = {}

    def start(self, op: Op, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        index = self._indices[op]
        self.log.append(("start", index))
        self.groups[index] = group
        assert async_op
        return None if op.kind == "attend" else LoggedWork(self.log, index)

    def finish(self, op: Op) -> None:
        self.log.append(("finish", self._indices[op]))


@given(schedules, st.booleans())
def test_cpu_lanes_keep_every_schedules_order(schedule: Schedule, record: bool) -> None:
    program = LoggedProgram(schedule)
    lanes = CpuLanes(cast(Any, "main"), cast(Any, {COMM: "in", COMM_OUT: "out"}))
    timeline = lanes.run(schedule, program, record=record)
    when = {event: i for i, event in enumerate(program.log)}
    assert Counter(program.log).most_common(1)[0][1] == 1  # nothing twice
    assert [i for what, i in program.log if what == "start"] == list(range(len(schedule.ops)))
    for i, op in enumerate(schedule.ops):
        assert ("finish", i) in when
        assert all(when["finish", earlier] < when["start", i] for earlier in op.after)
        if op.kind != "attend":
            assert when["start", i] < when["wait", i] < when["finish", i]
        assert program.groups[i] == {COMPUTE: "main", COMM: "in", COMM_OUT: "out"}[op.lane]
    assert (timeline is not None) == record
    if timeline is not None:
        assert tuple(span.op for span in timeline.spans) == schedule.ops
        assert timeline.source == "measured"
        assert all(0 <= span.begin_ms <= span.end_ms <= timeline.duration_ms for span in timeline.spans)


# The layer of the timing tests: a head of q, k and v, or of the output, from all ranks takes this long on the link.
HEADS, TOKENS, HEAD_DIM = 4, 64, 64
HEAD_MS = 5.0
LATENCY_US = 1000.0


def _slow_link(place: Place) -> list[Tensor]:
    """Set the emulated link so slow that the machine's own noise is small beside it; returns q, k, v."""
    inputs = [own(place, x) for x in whole_qkv((1, TOKENS * place.ranks, HEADS * place.ranks, HEAD_DIM), torch.float32)]
    leaving = TOKENS * HEAD_DIM * 4 * (place.ranks - 1)
    emulated.set_link(leaving / (HEAD_MS * 1e6), LATENCY_US)
    return inputs


def timelines(place: Place, method: str, plan: str, prefetch: int | None) -> list[Timeline]:
    """Of some warm calls. On a busy machine a rank may lose its core for longer than the link takes, in any of them."""
    inputs = _slow_link(place)
    try:
        attention = SequenceParallelAttention(place.emulated, method, plan, prefetch=prefetch, record_timeline=True)
        found = []
        with torch.inference_mode():
            for _ in range(5):
                attention(*inputs)
                assert attention.timeline is not None
                found.append(attention.timeline)
    finally:
        emulated.set_link()
    return found[1:]


def beside(timeline: Timeline, chunk: int) -> list[str]:
    """The communication that was under way at some time while a chunk was attended to."""
    attend = next(s for s in timeline.spans if s.op.kind == "attend" and s.op.chunk == chunk)
    return [
        f"{s.op.kind} {s.op.chunk}"
        for s in timeline.spans
        if s.op.kind != "attend" and s.begin_ms < attend.end_ms and attend.begin_ms < s.end_ms
    ]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("prefetch", [None, 1])
@pytest.mark.parametrize("method", ["hcms", "hcms-3lane"])
def test_communication_runs_beside_attention(method: str, prefetch: int | None, ranks: int) -> None:
    for calls in on_ranks(ranks, timelines, method, "1-1-1-1", prefetch):
        found = [[beside(timeline, chunk) for chunk in range(4)] for timeline in calls]
        assert any("exchange 1" in first and "exchange 2" in second and third for first, second, third, _ in found), (
            found
        )


@pytest.mark.parametrize("ranks", [2, 4])
def test_rotations_run_beside_attention(ranks: int) -> None:
    expected = [*([f"rotate {step}"] for step in range(ranks - 1)), []]
    for calls in on_ranks(ranks, timelines, "ring", "4", None):
        found = [[beside(timeline, step) for step in range(ranks)] for timeline in calls]
        assert expected in found


@pytest.mark.parametrize(
    ("method", "plan"), [("ulysses", "4"), ("ulysses-packed", "4"), ("hcms-serial", "1-1-1-1"), ("ceiling", "4")]
)
def test_serial_methods_never_overlap(method: str, plan: str) -> None:
    for calls in on_ranks(2, timelines, method, plan, None):
        for timeline in calls:
            assert all(before.end_ms <= after.begin_ms for before, after in pairwise(timeline.spans))


@pytest.mark.parametrize(
    ("method", "plan"), [("ulysses", "4"), ("hcms", "1-2-1"), ("hcms-3lane", "1-2-1"), ("ring", "4")]
)
def test_lanes_run_in_the_same_order_on_every_rank(method: str, plan: str) -> None:
    orders = []
    for timeline in chain.from_iterable(on_ranks(4, timelines, method, plan, None)):
        lanes: dict[str, list[Op]] = {}
        for span in sorted(timeline.spans, key=lambda s: s.begin_ms):
            lanes.setdefault(span.op.lane, []).append(span.op)
        orders.append(lanes)
    assert orders == [orders[0]] * len(orders)


@dataclass(frozen=True)
class Durations:
    """Of one method's calls, in ms; `results_ok` says that all were bitwise equal to ulysses."""

    shortest_ms: float
    results_ok: bool


ATTEND_MS = 30.0  # a head


def slowed(kernel: Kernel) -> Kernel:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sleep(q.shape[2] * ATTEND_MS * 1e-3)
        return kernel.attend(q, k, v)

    return replace(kernel, attend=attend)


def with_a_slow_kernel(place: Place) -> dict[str, Durations]:
    """Attention that takes a known time and no core, on a link of known pace."""
    inputs = _slow_link(place)
    found = {}
    expected_BLNH = SequenceParallelAttention(place.emulated, "ulysses")(*inputs)
    try:
        for method, plan in (("ulysses-packed", "4"), ("hcms-serial", "1-1-1-1"), ("hcms", "1-1-1-1")):
            attention = SequenceParallelAttention(place.emulated, method, plan, record_timeline=True)
            attention.kernel = slowed(attention.kernel)
            durations, equal = [], True
            for _ in range(6):
                dist.barrier(place.control)
                equal &= torch.equal(attention(*inputs), expected_BLNH)
                assert attention.timeline is not None
                durations.append(attention.timeline.duration_ms)
            found[method] = Durations(min(durations[1:]), equal)
    finally:
        emulated.set_link()
    return found


def test_overlap_saves_what_the_link_takes() -> None:
    """30 ms of attention a head beside 20 ms of communication: all but the two ends is hidden."""
    communication_ms, attention_ms = HEADS * 4 * HEAD_MS, HEADS * ATTEND_MS
    ends_ms = 4 * HEAD_MS + 2 * LATENCY_US * 1e-3
    for found in on_ranks(2, with_a_slow_kernel):
        assert all(durations.results_ok for durations in found.values())
        assert found["ulysses-packed"].shortest_ms >= communication_ms + attention_ms
        assert found["hcms-serial"].shortest_ms >= communication_ms + attention_ms
        assert found["hcms"].shortest_ms >= attention_ms + ends_ms
        assert found["hcms"].shortest_ms <= attention_ms + ends_ms + 0.5 * (communication_ms - ends_ms)


def three_groups(place: Place) -> list[bool]:
    """Returns on a communicator of their own: the same bits, and both groups are used."""
    schedule = three_lane((1, 2, 1), first="exchange")
    groups = {COMM: new_group("gloo"), COMM_OUT: new_group("gloo")}
    shape = LayerShape(2, 8, 4 * place.ranks, 16)
    exchange = HeadExchange(schedule, place.ranks, shape, torch.float32, place.device, heads_first=True)
    attention = SequenceParallelAttention(place.gloo, "ulysses")
    program = UlyssesProgram(exchange, attention.kernel)
    lanes = CpuLanes(place.gloo, groups)
    equal = []
    for seed in range(5):
        inputs = [own(place, x) for x in whole_qkv((2, 8 * place.ranks, 4 * place.ranks, 16), torch.float32, seed)]
        out_BLNH = torch.full_like(inputs[0], float("nan"))
        program.poison()
        q_BLNH, k_BLNH, v_BLNH = inputs
        program.bind(q_BLNH, k_BLNH, v_BLNH, out_BLNH)
        lanes.run(schedule, program)
        program.release()
        equal.append(torch.equal(out_BLNH, attention(*inputs)))
    return equal


@pytest.mark.parametrize("ranks", [2, 4])
def test_three_lanes_on_groups_of_their_own(ranks: int) -> None:
    assert on_ranks(ranks, three_groups) == [[True] * 5] * ranks


class Broken(RuntimeError):
    pass


def after_a_failure(place: Place, method: str) -> list[bool]:
    """A kernel that fails in the middle of a call, as out of memory does, on every rank; then calls that do not."""
    inputs = _slow_link(place)
    expected_BLNH = SequenceParallelAttention(place.emulated, "ulysses")(*inputs)
    attention = SequenceParallelAttention(place.emulated, method, "1-1-1-1")
    attend, calls = attention.kernel.attend, []

    def fails_second(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q)
        if len(calls) == 2:
            raise Broken
        return attend(q, k, v)

    attention.kernel = replace(attention.kernel, attend=fails_second)
    try:
        with pytest.raises(Broken):
            attention(*inputs)
        return [torch.equal(attention(*inputs), expected_BLNH) for _ in range(2)]
    finally:
        emulated.set_link()


@pytest.mark.parametrize("method", ["hcms-serial", "hcms", "hcms-3lane"])
def test_a_failed_call_leaves_the_object_usable(method: str) -> None:
    assert on_ranks(2, after_a_failure, method) == [[True, True]] * 2


def test_measured_timelines_are_chrome_traces(tmp_path: Path) -> None:
    timeline = on_ranks(2, timelines, "hcms", "1-2-1", None)[1][0]
    path = tmp_path / "traces" / "hcms.json"
    timeline.to_chrome_trace(path, rank=1)
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
    assert names.keys() == {COMPUTE, COMM}
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(timeline.spans) == 9
    for event, span in zip(spans, timeline.spans, strict=True):
        assert event["name"] == f"{span.op.kind} {span.op.chunk}"
        assert (event["tid"], event["pid"]) == (names[span.op.lane], 1)
        assert event["ts"] == pytest.approx(span.begin_ms * 1e3)
        assert event["dur"] == pytest.approx(span.duration_ms * 1e3)
