"""The ghost link without a card: the same group and the same places, moved by plain copies on the host.

Nothing of its streams is tested by it; what is laid, asked, answered and found wrong is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.lanes.cpu import CpuLanes
from hcms.links import ghost
from hcms.links.ghost_wire import Wire


class HostWire(Wire):
    """Works are done when they are issued."""

    def reserve(self, nbytes: int) -> None:
        self._expected, self._left, self._arriving = (torch.zeros(nbytes, dtype=torch.uint8) for _ in range(3))

    def _wait_for_card(self) -> None: ...

    def _forked(self) -> Any:
        return None

    def _joined(self, sides: Any, *, by: Any = None) -> Any:
        return ghost._Done(None)

    def _out(self, sides: Any, left: Tensor, leaves: Tensor) -> None:
        left.copy_(leaves.view(-1).view(torch.uint8))

    def _in(self, sides: Any, arrives: Tensor, arriving: Tensor) -> None:
        arrives.view(-1).view(torch.uint8).copy_(arriving)


@contextmanager
def ghost_on_host(ranks: int) -> Iterator[HostWire]:
    """This process as one rank of so many; data goes over the wire that is yielded, control traffic past it."""
    wire = HostWire()
    at_once = {name: getattr(ghost.GhostProcessGroup, name) for name in ("alltoall", "allgather")}

    def alltoall(self: Any, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        outputs[0].copy_(inputs[0])
        return wire.swap(list(zip(inputs[1:], outputs[1:], strict=True)))

    def allgather(self: Any, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        if not inputs[0].is_floating_point():
            return at_once["allgather"](self, outputs, inputs, opts)
        outputs[0][0].copy_(inputs[0])
        return wire.swap([(inputs[0], other) for other in outputs[0][1:]])

    group = ghost.GhostProcessGroup
    with (
        patch.object(ghost, "WIRE", wire),
        patch.object(group, "alltoall", alltoall),
        patch.object(group, "allgather", allgather),
        patch.object(SequenceParallelAttention, "_make_lanes", lambda self, device: CpuLanes(self.group, {})),
    ):
        dist.init_process_group(ghost.NAME, rank=0, world_size=ranks, store=dist.HashStore())
        try:
            yield wire
        finally:
            dist.destroy_process_group()
