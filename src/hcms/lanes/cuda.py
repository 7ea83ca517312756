"""Lanes on a GPU: CUDA streams ordered by events."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist

from hcms.lanes import Program
from hcms.lanes.own_sms import own_sms
from hcms.schedule.schedule import COMPUTE, COMPUTE_2, Schedule
from hcms.schedule.timeline import Span, Timeline


@cache
def side_stream(device: torch.device, lane: str) -> torch.cuda.Stream:
    """The stream of a lane beside the caller's, one a device for all attention objects.

    torch hands streams out of a pool of 32 and then again from its start: with streams of every object's own, two lanes
    of one object may be the same stream, and what should overlap runs one after the other.
    """
    # Attention's second lane has the caller's priority, so that both share the SMs block by block.
    return torch.cuda.Stream(device, priority=0 if lane == COMPUTE_2 else -1)


class CudaLanes:
    """Lanes on a GPU: attention on the caller's current stream (and one more, where a schedule asks for it), each
    communication lane a high-priority side stream. Where a schedule keeps SMs for communication, all lanes are side
    streams, on the two parts of a divided card (`hcms.lanes.own_sms`).

    Streams are one set a device, shared with every other object's lanes, which `start` orders; events belong to this
    object and are reused by every call. No call synchronises the host
    (recording a Timeline does, once, at its end), allocates events, or uses `record_stream`: what side streams read or
    write is owned by the method or kept alive by the caller until the current stream has waited for them, at the
    latest at the end of `run`.

    Args:
        device: the device of all tensors.
        group: the NCCL group for communication on the compute lane (serial schedules).
        groups: the NCCL group of each communication lane.
        place: `(i, n)`: this rank is the i-th of n that share the card.
        few: `(lane, blocks)` to a group whose kernels have so many blocks at most, for schedules that keep SMs for
            communication; None where no kernels communicate.
    """

    def __init__(
        self,
        device: torch.device,
        group: dist.ProcessGroup,
        groups: dict[str, dist.ProcessGroup],
        place: tuple[int, int] = (0, 1),
        few: Callable[[str, int], dist.ProcessGroup] | None = None,
    ) -> None:
        self._device, self._place, self._few = device, place, few
        self._groups_of: dict[int, dict[str, dist.ProcessGroup]] = {0: groups}  # by SMs kept for communication
        self._group = group
        self._streams = {lane: side_stream(device, lane) for lane in (*groups, COMPUTE_2)}
        self._events: dict[bool, list[torch.cuda.Event]] = {False: [], True: []}

    def _event(self, index: int, timing: bool) -> torch.cuda.Event:
        pool = self._events[timing]
        while len(pool) <= index:
            pool.append(torch.cuda.Event(enable_timing=timing))
        return pool[index]

    def prepare(self, schedule: Schedule) -> None:
        """Divide the card where `schedule` keeps SMs for communication.

        Raises:
            RuntimeError: it cannot be divided so.
        """
        if schedule.comm_sms:
            own_sms(self._device, schedule.comm_sms, self._place)
            groups = self._groups_of[0]
            if self._few is not None:
                blocks = max(1, schedule.comm_sms // len(groups))  # one an SM finds room beside the other lanes'
                groups = {lane: self._few(lane, blocks) for lane in groups}
            self._groups_of[schedule.comm_sms] = groups

    def _lanes_of(self, schedule: Schedule, current: torch.cuda.Stream) -> dict[str, torch.cuda.Stream]:
        """Each lane's stream for a call that is made from `current`."""
        if schedule.comm_sms:
            divided = own_sms(self._device, schedule.comm_sms, self._place)
            return {lane: divided[lane] for lane in schedule.lanes}
        return {lane: current if lane == COMPUTE else self._streams[lane] for lane in schedule.lanes}

    def run(self, schedule: Schedule, program: Program, *, record: bool = False) -> Timeline | None:
        current = torch.cuda.current_stream(self._device)
        lanes, groups = self._lanes_of(schedule, current), self._groups_of[schedule.comm_sms]
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
        used = current  # to change torch's stream costs the host, so only where the lane changes
        try:
            with torch.cuda.device(self._device):
                for index, op in enumerate(schedule.ops):
                    stream = lanes[op.lane]
                    for earlier in op.after:
                        # Same lane: the stream's own order is the edge.
                        if schedule.ops[earlier].lane != op.lane:
                            stream.wait_event(ends[earlier])
                    if stream is not used:
                        torch.cuda.set_stream(stream)
                        used = stream
                    if record:
                        begins[index].record(stream)
                    work = program.start(op, groups.get(op.lane, self._group), False)
                    if work is not None:
                        work.wait()  # orders `stream` after the collective; the host goes on
                    program.finish(op)
                    ends[index].record(stream)
        except BaseException:
            # The caller is about to drop tensors that side streams still read.
            for stream in lanes.values():
                current.wait_stream(stream)
            raise
        finally:
            if used is not current:
                with torch.cuda.device(self._device):  # the caller's own device stays what it was
                    torch.cuda.set_stream(current)
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
