"""A c10d backend, "ghost": this process is one rank of P on one card, and its peers are pinned host memory.

    dist.init_process_group("ghost", rank=0, world_size=4, store=dist.HashStore())
    WIRE.reserve(nbytes)
    WIRE.prepare(heads=40)          # an untimed pass of the same calls follows, then
    WIRE.replay()                   # the timed ones; then
    WIRE.wrong_bytes()              # how much of what left was not what should have

Real are the kernels at full speed and size, the traffic (every byte off the rank goes out to pinned host memory while
as many come in, by copy engines, both directions at once, over the card's own PCIe), the streams and the results.
Not real: peers have no skew, and no NCCL kernel takes SMs.

What arrives must be right, or nothing is checked. The world is a consistent one: with this rank's heads in P groups,
rank j's token shard holds in group g what this rank's holds in group g + j. Then an all-to-all brings back from each
peer what was sent to it, a return likewise, and what a ring passes on arrives turned by one group. In the prepared
pass the arriving bytes are laid into host memory; in a replayed one they are there before the call begins, as a peer's
would be, and leave no time to wait for what goes out.
"""

# torch ships no stubs for c10d's options.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from hcms.links import Link
from hcms.links.ghost_wire import WIRE, done
from hcms.links.named import NamedGroup

NAME = "ghost"


def lay(group: dist.ProcessGroup, heads: int, call: Callable[[], object]) -> None:
    """Make `call` once as an untimed pass, after which it can be replayed. Over another link, nothing."""
    if dist.get_backend(group) == NAME:
        WIRE.prepare(heads)
        call()
        WIRE.replay()


def rewind(group: dist.ProcessGroup) -> None:
    """Before each call of what was laid. Over another link, nothing."""
    if dist.get_backend(group) == NAME:
        WIRE.replay()


class _Done(dist.Work):
    """A work of a peer that agrees at once."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True

    def get_future(self) -> Future:
        return done(self._result)


class GhostProcessGroup(NamedGroup):
    """One rank of P. Tensors on the host are answered at once, as by peers that hold the same."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(NAME, rank, size)
        self._own, self._others = rank, [j for j in range(size) if j != rank]

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        own = self._own
        if inputs[own].numel():
            outputs[own].copy_(inputs[own], non_blocking=True)
        if inputs[own].numel() and not inputs[own].is_cuda:
            for j in self._others:
                outputs[j].copy_(inputs[j])
            return _Done(outputs)
        return WIRE.swap([(inputs[j], outputs[j]) for j in self._others])

    def alltoall_base(
        self, output: Tensor, input: Tensor, out_splits: Any, in_splits: Any, opts: Any = None
    ) -> dist.Work:
        P = self.size()
        outputs = list(output.split(out_splits, 0) if out_splits else output.chunk(P, 0))
        inputs = list(input.split(in_splits, 0) if in_splits else input.chunk(P, 0))
        return self.alltoall(outputs, inputs, opts)

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> dist.Work:
        return WIRE.send(tensors[0])

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> dist.Work:
        return WIRE.receive(tensors[0])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Peers answer with what this rank holds; the bytes off the rank go over the wire."""
        for gathered, x in zip(outputs, inputs, strict=True):
            for j, target in enumerate(gathered):
                target.copy_(x) if not x.is_cuda or j == self._own else None
        if not inputs[0].is_cuda:
            return _Done(outputs)
        return WIRE.swap([(x, g[j]) for g, x in zip(outputs, inputs, strict=True) for j in self._others])

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        return self.allgather([list(output.view(self.size(), *input.shape).unbind(0))], [input], opts)

    all_gather_single = _allgather_base  # what dist.all_gather_into_tensor calls it from torch 2.13 on

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        assert len(outputs) == len(inputs) == 1
        return self._allgather_base(outputs[0], inputs[0], opts)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        if opts is not None and opts.reduceOp == dist.ReduceOp.SUM:
            for x in tensors:
                x.mul_(self.size())
        return _Done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return _Done(tensors)

    def barrier(self, opts: Any = None) -> dist.Work:
        return _Done(None)


def start(
    rank: int, ranks: int, device: torch.device, timeout: timedelta, store: dist.Store | None
) -> dist.ProcessGroup:
    """The default group of one rank of `ranks`; it answers control traffic itself."""
    WIRE.engine = "copy"
    dist.init_process_group(NAME, rank=0, world_size=ranks, store=dist.HashStore(), timeout=timeout)
    group = dist.group.WORLD
    assert group is not None
    return group


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> GhostProcessGroup:
    return GhostProcessGroup(rank, size)


if NAME not in dist.Backend.backend_list:
    dist.Backend.register_backend(NAME, _create, devices=["cpu", "cuda"])

LINK = Link(
    NAME,
    "one rank of P on one card: kernels, PCIe traffic both ways and results are real; peers are memory, without skew "
    "or NCCL",
    ("cuda",),
    "one",
    start,
)
