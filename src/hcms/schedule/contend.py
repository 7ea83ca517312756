"""Price a schedule on a GPU, where operations contend: for the SMs, for the link, and with the host that issues them.

An operation is a few stages, one after the other, each with what it occupies:

- `copy` needs SMs, a few blocks' worth. While a persistent attention kernel runs it cannot start (the kernel holds
  every SM until its last wave of tiles, which leaves some); then it goes first, as its blocks are waiting. Where
  attention becomes ready at the same moment, as it does when the exchange before a copy ends, attention is there first
  (both seen in H100 timelines).
- `wire` occupies the link, and no SM if copy engines move the bytes; NCCL's kernels need some, and then it waits as a
  copy does, unless the schedule keeps SMs for communication. Wires that are under way at once share the link's
  bandwidth.
- `attend` occupies the SMs: attention of two lanes takes turns.

Lanes are first in, first out. The host issues operations one after the other and waits for none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from hcms.schedule.schedule import COMPUTE_LANES, Op, Schedule
from hcms.schedule.timeline import Span, Timeline

_EPSILON_MS = 1e-9


class Stage(NamedTuple):
    """A part of an operation: what it occupies, and for how long where nothing contends; attention's last wave."""

    occupies: Literal["copy", "wire", "attend", "nothing"]
    ms: float
    tail_ms: float = 0.0


class GpuCosts(Protocol):
    """Anything that prices the operations of a schedule on a GPU.

    `holds_sms`: attention's kernel is persistent. `wire_needs_sms`: the transport runs kernels. `ports`: 2 where what
    goes out on a lane of its own does not share the bandwidth of the other.
    """

    @property
    def holds_sms(self) -> bool: ...
    @property
    def wire_needs_sms(self) -> bool: ...
    @property
    def ports(self) -> int: ...
    def stages(self, op: Op, schedule: Schedule) -> tuple[Stage, ...]: ...
    def host_ms(self, op: Op, schedule: Schedule) -> float: ...


@dataclass
class _Running:
    index: int
    stages: list[Stage]
    left_ms: float
    ready_ms: float  # since when the current stage could go on, but for what it occupies
    started: bool = False

    @property
    def holds_sms_ms(self) -> float:
        """How much longer an attention leaves no SM to others."""
        return self.left_ms - self.stages[0].tail_ms


@dataclass
class _State:
    now_ms: float = 0.0
    running: dict[str, _Running] = field(default_factory=dict)  # by lane

    def attending(self) -> list[_Running]:
        return [r for r in self.running.values() if r.started and r.stages[0].occupies == "attend"]

    def wires(self) -> list[_Running]:
        return [r for r in self.running.values() if r.started and r.stages[0].occupies == "wire"]


def contend(schedule: Schedule, costs: GpuCosts) -> Timeline:
    """Run `schedule` against `costs`; the duration ends with the last operation.

    Stages progress at a rate of one, wires at one over their number. Time advances from one stage's end to the next.
    """
    issued_ms: list[float] = []
    host_free_ms = 0.0
    for op in schedule.ops:
        host_free_ms += costs.host_ms(op, schedule)
        issued_ms.append(host_free_ms)
    queues = {lane: [i for i, op in enumerate(schedule.ops) if op.lane == lane] for lane in schedule.lanes}
    ended_ms: dict[int, float] = {}
    begun_ms: dict[int, float] = {}
    state = _State()

    def on_compute(r: _Running) -> bool:
        return schedule.ops[r.index].lane in COMPUTE_LANES

    def may_start(r: _Running) -> bool:
        occupies = r.stages[0].occupies
        attending = state.attending()
        if occupies == "attend":
            return not attending  # on two lanes: the next takes the SMs when this one has none to give out any more
        if schedule.comm_sms and not on_compute(r):
            return True  # on SMs of its own
        needs_sms = occupies == "copy" or (occupies == "wire" and costs.wire_needs_sms)
        return not (needs_sms and costs.holds_sms and any(r.holds_sms_ms > _EPSILON_MS for r in attending))

    while len(ended_ms) < len(schedule.ops):
        progressed = True
        while progressed:
            progressed = False
            for lane, r in list(state.running.items()):  # first what ends: it makes room
                if r.started and r.left_ms <= _EPSILON_MS:
                    _next_stage(state, lane, r, ended_ms)
                    progressed = True
            for lane, queue in queues.items():
                if lane in state.running or not queue:
                    continue
                op = schedule.ops[queue[0]]
                if all(e in ended_ms for e in op.after) and issued_ms[queue[0]] <= state.now_ms + _EPSILON_MS:
                    stages = [s for s in costs.stages(op, schedule) if s.ms > 0] or [Stage("nothing", 0.0)]
                    state.running[lane] = _Running(queue.pop(0), stages, stages[0].ms, state.now_ms)
            # Who has waited longest goes first; of those that wait since the same moment attention does, and of two
            # lanes of attention what was issued first.
            for r in sorted(state.running.values(), key=lambda r: (r.ready_ms, not on_compute(r), r.index)):
                if not r.started and may_start(r):
                    r.started = True
                    begun_ms.setdefault(r.index, state.now_ms)
                    progressed = True
        if len(ended_ms) == len(schedule.ops):
            break
        sharing = max(1, len(state.wires())) if costs.ports == 1 else 1
        steps = [
            r.left_ms * (sharing if r.stages[0].occupies == "wire" else 1) for r in state.running.values() if r.started
        ]
        steps += [r.holds_sms_ms for r in state.attending() if r.holds_sms_ms > _EPSILON_MS]
        steps += [
            issued_ms[queue[0]] - state.now_ms
            for lane, queue in queues.items()
            if queue and lane not in state.running and issued_ms[queue[0]] > state.now_ms + _EPSILON_MS
        ]
        assert steps, f"{schedule.name}: nothing can go on; an edge waits for what comes later on its own lane"
        step_ms = min(steps)
        state.now_ms += step_ms
        for r in state.running.values():
            if r.started:
                r.left_ms -= step_ms / (sharing if r.stages[0].occupies == "wire" else 1)
    spans = tuple(Span(op, begun_ms[i], ended_ms[i]) for i, op in enumerate(schedule.ops))
    return Timeline(schedule, spans, max(state.now_ms, host_free_ms), "predicted")


def _next_stage(state: _State, lane: str, r: _Running, ended_ms: dict[int, float]) -> None:
    r.stages.pop(0)
    if r.stages:
        r.left_ms, r.ready_ms, r.started = r.stages[0].ms, state.now_ms, False
    else:
        ended_ms[r.index] = state.now_ms
        del state.running[lane]
