"""An all-to-all of slots on any c10d group (NCCL, Gloo, or a link of `hcms.links`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """What one all-to-all sends and where it arrives: a slot a rank, `[P, ...]`, in memory that outlives the exchange.

    Args:
        send, recv: contiguous, of one shape.
        rank: this rank. With `own_apart` its own slot is neither sent nor written: whoever packs puts it into place.
    """

    send: Tensor
    recv: Tensor
    rank: int
    own_apart: bool

    def exchange(self, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        """Start the all-to-all on the current stream; returns the Work if asynchronous."""
        if not self.own_apart:
            return dist.all_to_all_single(self.recv, self.send, group=group, async_op=async_op)
        return dist.all_to_all(self._without_own(self.recv), self._without_own(self.send), group, async_op)

    def _without_own(self, x: Tensor) -> list[Tensor]:
        slots = list(x.unbind(0))
        slots[self.rank] = x.new_empty(0)
        return slots


def others(rank: int, ranks: int) -> list[slice]:
    """The slots of all ranks but this one, as ranges."""
    return [s for s in (slice(0, rank), slice(rank + 1, ranks)) if s.stop > s.start]
