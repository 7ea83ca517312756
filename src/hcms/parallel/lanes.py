"""Run a schedule on lanes: CUDA streams ordered by events, or, on CPU, asynchronous works issued by one thread.

A method is a `Program`: what each operation does. The runner knows neither shapes nor methods, only the schedule's
order, so one runner serves Ulysses, HCMS with two or three lanes and Ring Attention.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Protocol

import torch
import torch.distributed as dist

from hcms.schedule.schedule import COMPUTE, Op, Schedule
from hcms.schedule.timeline import Span, Timeline


class Program(Protocol):
    """What the operations of one call do, bound to that call's tensors."""

    def start(self, op: Op, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        """Do or start `op` on the current stream; returns the Work of an asynchronous collective."""
        ...

    def finish(self, op: Op) -> None:
        """Make the result of a completed `op` usable (unpack), on the current stream."""
        ...


class Lanes(Protocol):
    """Runs schedules. `run` returns the measured Timeline if asked to record one."""

    def run(self, schedule: Schedule, program: Program, *, record: bool = False) -> Timeline | None: ...


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
                if op.lane == COMPUTE:
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


class CudaLanes:
    """Lanes on a GPU: attention on the caller's current stream, each communication lane a high-priority side stream.

    Streams and events belong to this object, one set a device, reused by every call. No call synchronises the host
    (recording a Timeline does, once, at its end), allocates events, or uses `record_stream`: what side streams read or
    write is owned by the method or kept alive by the caller until the current stream has waited for them, at the
    latest at the end of `run`.

    Args:
        device: the device of all tensors.
        group: the NCCL group for communication on the compute lane (serial schedules).
        groups: the NCCL group of each communication lane.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup, groups: dict[str, dist.ProcessGroup]) -> None:
        self._device = device
        self._group = group
        self._groups = groups
        self._streams = {lane: torch.cuda.Stream(device, priority=-1) for lane in groups}
        self._events: dict[bool, list[torch.cuda.Event]] = {False: [], True: []}

    def _event(self, index: int, timing: bool) -> torch.cuda.Event:
        pool = self._events[timing]
        while len(pool) <= index:
            pool.append(torch.cuda.Event(enable_timing=timing))
        return pool[index]

    def run(self, schedule: Schedule, program: Program, *, record: bool = False) -> Timeline | None:
        current = torch.cuda.current_stream(self._device)
        lanes = {lane: current if lane == COMPUTE else self._streams[lane] for lane in schedule.lanes}
        # Ready and free, in one edge: a side stream starts after all that the caller's stream holds so far, which made
        # the inputs and, in the call before this one, was the last reader of the buffers that are written now.
        start = self._event(0, record)
        start.record(current)
        for stream in lanes.values():
            if stream is not current:
                stream.wait_event(start)
        count = len(schedule.ops)
        ends = [self._event(1 + i, record) for i in range(count)]
        begins = [self._event(1 + count + i, record) for i in range(count)] if record else []
        try:
            for index, op in enumerate(schedule.ops):
                stream = lanes[op.lane]
                for earlier in op.after:
                    # Same lane: the stream's own order is the edge.
                    if schedule.ops[earlier].lane != op.lane:
                        stream.wait_event(ends[earlier])
                with torch.cuda.stream(stream):
                    if record:
                        begins[index].record(stream)
                    work = program.start(op, self._groups.get(op.lane, self._group), False)
                    if work is not None:
                        work.wait()  # orders `stream` after the collective; the host goes on
                    program.finish(op)
                    ends[index].record(stream)
        except BaseException:
            # The caller is about to drop tensors that side streams still read.
            for stream in lanes.values():
                current.wait_stream(stream)
            raise
        # The caller's stream waits for every side stream: from here on the output is whole, inputs may be reused, and
        # memory that side streams touched may be freed in the caller's stream order.
        for lane, stream in lanes.items():
            if stream is not current:
                current.wait_event(ends[max(i for i, op in enumerate(schedule.ops) if op.lane == lane)])
        if not record:
            return None
        stop = self._event(1 + 2 * count, True)
        stop.record(current)
        stop.synchronize()
        spans = tuple(
            Span(op, start.elapsed_time(begin), start.elapsed_time(end))
            for op, begin, end in zip(schedule.ops, begins, ends, strict=True)
        )
        return Timeline(schedule, spans, start.elapsed_time(stop), "measured")
