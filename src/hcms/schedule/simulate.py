"""Price a schedule: from what each operation costs to when each begins and ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hcms.schedule.schedule import COMPUTE_LANES, Op, Schedule
from hcms.schedule.timeline import Span, Timeline


@dataclass(frozen=True, slots=True)
class OpCost:
    """What one operation costs.

    Args:
        lane_ms: time that it holds its lane.
        host_ms: time that the host needs to issue it; on CPU the packing, on CUDA the launches.
        finish_ms: time to make the result usable; on CPU the host unpacks when somebody first waits for it, on
            CUDA it is part of `lane_ms`.
    """

    lane_ms: float
    host_ms: float = 0.0
    finish_ms: float = 0.0


class Costs(Protocol):
    """Anything that prices the operations of a schedule."""

    @property
    def host_computes(self) -> bool:
        """Whether the issuing thread itself runs the compute lane (CPU) or only launches onto it (CUDA)."""
        ...

    def op_cost(self, op: Op, schedule: Schedule) -> OpCost: ...


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Run `schedule` against `costs` with FIFO lanes and a host that issues one operation after the other.

    Returns a predicted Timeline; its duration ends when the host has finished every operation.
    """
    lane_free_ms: dict[str, float] = {}
    ended_ms: list[float] = []
    finish_ms: list[float] = []
    finished: set[int] = set()
    spans: list[Span] = []
    host_free_ms = 0.0

    def finish(index: int) -> None:
        """The host waits for an operation and makes its result usable, once."""
        nonlocal host_free_ms
        if index not in finished:
            finished.add(index)
            host_free_ms = max(host_free_ms, ended_ms[index]) + finish_ms[index]

    for index, op in enumerate(schedule.ops):
        cost = costs.op_cost(op, schedule)
        if costs.host_computes:
            for earlier in op.after:
                finish(earlier)
        host_free_ms += cost.host_ms
        ready_ms = max((ended_ms[earlier] for earlier in op.after), default=0.0)
        begin_ms = max(host_free_ms, ready_ms, lane_free_ms.get(op.lane, 0.0))
        end_ms = begin_ms + cost.lane_ms
        lane_free_ms[op.lane] = end_ms
        ended_ms.append(end_ms)
        finish_ms.append(cost.finish_ms)
        if costs.host_computes and op.lane in COMPUTE_LANES:
            finish(index)
        spans.append(Span(op, begin_ms, end_ms))
    for index in range(len(ended_ms)):
        finish(index)
    return Timeline(schedule, tuple(spans), host_free_ms, "predicted")
