"""Run a schedule on lanes. A method is a `Program`: what each operation does.

A runner knows neither shapes nor methods, only the schedule's order, so one serves Ulysses, HCMS with two or three
lanes and Ring Attention. Edges of the schedule are the only order between lanes.
"""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist

from hcms.schedule.schedule import Op, Schedule
from hcms.schedule.timeline import Timeline


class Program(Protocol):
    """What the operations of one call do, bound to that call's tensors."""

    def start(self, op: Op, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        """Do or start `op` on the current stream; returns the Work of an asynchronous collective."""
        ...

    def finish(self, op: Op) -> None:
        """Make the result of a completed `op` usable (unpack), on the current stream."""
        ...


class Lanes(Protocol):
    """Runs schedules. `prepare` makes what one needs, or says why it cannot run here; `run` returns the measured
    Timeline if asked to record one."""

    def prepare(self, schedule: Schedule) -> None: ...

    def run(self, schedule: Schedule, program: Program, *, record: bool = False) -> Timeline | None: ...
