"""Lanes on a CPU: asynchronous works issued by one thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from time import perf_counter

import torch.distributed as dist

from hcms.lanes import Program
from hcms.schedule.schedule import COMPUTE_LANES, Schedule
from hcms.schedule.timeline import Span, Timeline


class CpuLanes:
    """Lanes on a CPU: the calling thread computes, and communication is whatever asynchronous works are under way.

    Waiting on a link costs no core, so overlap is real. An operation's result is finished (unpacked) when the first
    operation that needs it is reached, or at the end in issue order, while the last return is still on its way. A
    lane thread in place of asynchronous works was measured too and is slower (docs/what-did-not-pay.md).

    Args:
        group: the group for communication on the compute lane (serial schedules).
        groups: the process group of each communication lane; lanes that share a group share its order.
        completed_s: when the Work that was waited for last was complete, on perf_counter's clock. The default says
            now, which for a work that ended unnoticed under a computation is the end of that computation.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        groups: dict[str, dist.ProcessGroup],
        completed_s: Callable[[], float] = perf_counter,
    ) -> None:
        self._group = group
        self._groups = groups
        self._completed_s = completed_s

    def prepare(self, schedule: Schedule) -> None:
        """Refuse a schedule that keeps SMs for communication: a CPU has none.

        Raises:
            ValueError: such a schedule.
        """
        if schedule.comm_sms:
            raise ValueError(f"+sms{schedule.comm_sms}: a CPU has no SMs to keep for communication; leave it out")

    def run(self, schedule: Schedule, program: Program, *, record: bool = False) -> Timeline | None:
        works: list[dist.Work | None] = []
        begins_s: list[float] = []
        ends_s: list[float] = []
        finished = 0b0
        began_s = perf_counter()

        def finish(index: int) -> None:
            nonlocal finished
            if finished >> index & 1:
                return
            finished |= 1 << index
            work = works[index]
            if work is not None:
                work.wait()
                ends_s[index] = self._completed_s()
            program.finish(schedule.ops[index])

        try:
            for index, op in enumerate(schedule.ops):
                for earlier in op.after:
                    finish(earlier)
                begins_s.append(perf_counter())
                works.append(program.start(op, self._groups.get(op.lane, self._group), True))
                ends_s.append(perf_counter())
                if op.lane in COMPUTE_LANES:
                    finish(index)
                    ends_s[index] = perf_counter()
            for index in range(len(works)):
                finish(index)
        except Exception:
            # What is under way still writes buffers that the next call would fill.
            for work in works:
                with suppress(Exception):
                    if work is not None:
                        work.wait()
            raise
        if not record:
            return None
        spans = tuple(
            Span(op, (begin_s - began_s) * 1e3, (end_s - began_s) * 1e3)
            for op, begin_s, end_s in zip(schedule.ops, begins_s, ends_s, strict=True)
        )
        return Timeline(schedule, spans, (perf_counter() - began_s) * 1e3, "measured")
