"""A c10d backend, "ghost": this process is one rank of P on one card, and its peers are pinned host memory.

    dist.init_process_group("ghost", rank=0, world_size=4, store=dist.HashStore())
    WIRE.reserve(nbytes)
    WIRE.prepare(heads=40)          # an untimed pass of the same calls follows, then
    WIRE.replay()                   # the timed ones; then
    WIRE.wrong_bytes()              # how much of what left was not what should have

Real are the kernels at full speed and size, the traffic (every byte off the rank goes out to pinned host memory while
as many come in, by copy engines, both directions at once, over the card's own PCIe), the streams and the results.
Not real: peers have no skew, and no NCCL kernel takes SMs (`engine="sm"` drives the same bytes by a kernel of a few
blocks on mapped memory instead, to show what that does to attention).

What arrives must be right, or nothing is checked. The world is a consistent one: with this rank's heads in P groups,
rank j's token shard holds in group g what this rank's holds in group g + j. Then an all-to-all brings back from each
peer what was sent to it, a return likewise, and what a ring passes on arrives turned by one group. In the prepared
pass the arriving bytes are laid into host memory; in a replayed one they are there before the call begins, as a peer's
would be, and leave no time to wait for what goes out.
"""

# torch ships no stubs for c10d's options.
# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from hcms.links import Link

NAME = "ghost"
_ALIGN = 256
_SCRATCH_BYTES = 64 << 20
_SM_KERNEL = """
extern "C" __global__ void swap(uint4* out_to, const uint4* out_from, int out_n, uint4* in_to, const uint4* in_from,
                                int in_n) {
    const int half = gridDim.x / 2;
    const bool out = blockIdx.x < half;
    uint4* to = out ? out_to : in_to;
    const uint4* from = out ? out_from : in_from;
    const int n = out ? out_n : in_n;
    const int stride = half * blockDim.x;
    int i = (out ? blockIdx.x : blockIdx.x - half) * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < n; i += 4 * stride) {
        uint4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
        to[i] = a; to[i + stride] = b; to[i + 2 * stride] = c; to[i + 3 * stride] = d;
    }
    for (; i < n; i += stride) to[i] = from[i];
}
"""


@dataclass(frozen=True)
class _Sides:
    """The streams of the works that are issued from one stream: what leaves, what arrives; and an event each way.

    Each calling stream has its own: shared, two lanes' works would queue behind each other.
    """

    out: torch.cuda.Stream
    into: torch.cuda.Stream
    ready: torch.cuda.Event
    left: torch.cuda.Event
    arrived: torch.cuda.Event

    @staticmethod
    def make() -> _Sides:
        out, into = (torch.cuda.Stream(priority=-1) for _ in range(2))
        ready, left, arrived = (torch.cuda.Event() for _ in range(3))
        return _Sides(out, into, ready, left, arrived)


class Wire:
    """The card's way to its host: pinned memory that holds what leaves, what should have, and what arrives."""

    def __init__(self) -> None:
        self.mode: Literal["prepare", "replay"] = "prepare"
        self.engine: Literal["copy", "sm"] = "copy"
        self.sm_blocks = 8
        self.sent_bytes = 0
        self._heads = 0
        self._expected = self._left = self._arriving = torch.empty(0, dtype=torch.uint8)
        self._out_at = self._in_at = 0
        self._prepared_out_at = self._prepared_in_at = 0
        self._extra = (0.0, 0)  # bytes sent again for each byte, and for each work
        self._scratch: tuple[Tensor, Tensor, Tensor] | None = None
        self._sides: dict[int, _Sides] = {}
        self._sm_kernel: Any = None
        self.last_sent: Tensor | None = None

    def reserve(self, nbytes: int) -> None:
        """Pin memory for works of `nbytes` in either direction between two `prepare` or `replay`.

        Captured graphs hold its addresses: reserve what is needed before the first is captured.
        """
        if nbytes > self._left.nbytes:
            self._expected, self._left, self._arriving = (
                torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(3)
            )

    def slow(self, *, gbps: float | None = None, native_gbps: float = 45.0, latency_us: float = 0.0) -> None:
        """Make the link slower than PCIe is, without an SM and without the host: bytes go twice.

        Args:
            gbps: the bandwidth off the rank that is wanted; None leaves what there is.
            native_gbps: what there is, both directions at once.
            latency_us: as much more time a work.

        Raises:
            ValueError: a bandwidth that is not positive or above what there is, or a negative latency.
        """
        if gbps is not None and not 0 < gbps <= native_gbps:
            raise ValueError(f"a ghost link can be slowed to at most {native_gbps:g} GB/s, got {gbps}")
        if latency_us < 0:
            raise ValueError(f"a ghost link needs a latency of at least 0 µs, got {latency_us}")
        self._extra = (native_gbps / gbps - 1 if gbps else 0.0, round(latency_us * native_gbps * 1e3))
        if self._extra != (0.0, 0) and self._scratch is None:
            size = _SCRATCH_BYTES
            card = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
            self._scratch = (*card, torch.empty(2 * size, dtype=torch.uint8, pin_memory=True))

    def prepare(self, heads: int) -> None:
        """From now on, works lay down what should leave and what arrives: a pass of the calls that are replayed next.

        Args:
            heads: N, by which what a ring passes on is turned.
        """
        self.mode, self._heads = "prepare", heads
        self._out_at = self._in_at = 0

    def replay(self) -> None:
        """From now on, works are those of the prepared pass again, in its order, from its first."""
        if self.mode == "prepare":
            self._prepared_out_at, self._prepared_in_at = self._out_at, self._in_at
        self.mode = "replay"
        self._out_at = self._in_at = 0

    def spoil(self) -> None:
        """Overwrite what left, so that bytes that do not leave in the next replay show."""
        self._left[: self._prepared_out_at].fill_(0xA5)

    def wrong_bytes(self) -> int:
        """Of what left in the replayed pass, the bytes that are not what should have. Waits for the card."""
        torch.cuda.synchronize()
        n = self._prepared_out_at
        if torch.equal(self._left[:n], self._expected[:n]):
            return 0
        return int((self._left[:n] != self._expected[:n]).sum())

    def swap(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> _Swapped:
        """Send and receive: for each pair `(leaves, arrives)`, contiguous tensors on the card, of as many bytes.

        Issued from the current stream, which the work's `wait` orders behind both directions.
        """
        sides = self._forked()
        for leaves, arrives in _merged(pairs):
            left, arriving = self._out_place(leaves), self._in_place(arrives)
            if self.mode == "prepare":
                self._lay(left, leaves)
                arriving.copy_(_bytes(leaves), non_blocking=True)
                _bytes(arrives).copy_(arriving, non_blocking=True)
            elif self.engine == "sm":
                self._swap_by_kernel(left, leaves, arrives, arriving)
            else:
                self._out(sides, left, leaves)
                self._in(sides, arrives, arriving)
        return self._joined(sides)

    def send(self, leaves: Tensor) -> _Swapped:
        sides = self._forked()
        self.last_sent = leaves
        left = self._out_place(leaves)
        if self.mode == "prepare":
            self._lay(left, leaves)
        else:
            self._out(sides, left, leaves)
        return self._joined(sides)

    def receive(self, arrives: Tensor) -> _Swapped:
        """What a peer passes on: this rank's own last message, its heads turned by one rank's."""
        sides = self._forked()
        arriving = self._in_place(arrives)
        if self.mode == "prepare":
            if self.last_sent is None or self.last_sent.shape != arrives.shape:
                raise RuntimeError("ghost: a receive must follow a send of the same shape, as in a ring")
            heads = [d for d in (-2, 1, 2) if -arrives.ndim <= d < arrives.ndim and arrives.shape[d] == self._heads]
            if not heads:
                raise RuntimeError(f"ghost: no dimension of {tuple(arrives.shape)} holds {self._heads} heads")
            turned = torch.roll(self.last_sent, self._heads // dist.get_world_size(), heads[0])
            arriving.copy_(_bytes(turned), non_blocking=True)
            arrives.copy_(turned)
        else:
            self._in(sides, arrives, arriving)
        return self._joined(sides)

    # ---- places ------------------------------------------------------------------------------------------------------

    def _out_place(self, x: Tensor) -> Tensor:
        at, self._out_at = self._out_at, self._next(self._out_at, x)
        self.sent_bytes += x.nbytes
        return self._left[at : at + x.nbytes]

    def _in_place(self, x: Tensor) -> Tensor:
        at, self._in_at = self._in_at, self._next(self._in_at, x)
        return self._arriving[at : at + x.nbytes]

    def _next(self, at: int, x: Tensor) -> int:
        end = at + -(-x.nbytes // _ALIGN) * _ALIGN
        if end > self._left.nbytes:
            raise RuntimeError(f"ghost: {end} bytes in one pass, {self._left.nbytes} reserved; WIRE.reserve() more")
        return end

    def _lay(self, left: Tensor, leaves: Tensor) -> None:
        """What should leave, and is taken for having left until a replay says otherwise."""
        at = left.storage_offset()
        self._expected[at : at + left.nbytes].copy_(_bytes(leaves), non_blocking=True)
        left.copy_(_bytes(leaves), non_blocking=True)

    # ---- the card's two directions -----------------------------------------------------------------------------------

    def _forked(self) -> _Sides:
        current = torch.cuda.current_stream()
        sides = self._sides.get(current.cuda_stream)
        if sides is None:
            sides = self._sides[current.cuda_stream] = _Sides.make()
        # What leaves was made, and the memory that is written was last read, by the calling stream or before it.
        sides.ready.record(current)
        sides.out.wait_event(sides.ready)
        sides.into.wait_event(sides.ready)
        return sides

    def _joined(self, sides: _Sides) -> _Swapped:
        sides.left.record(sides.out)
        sides.arrived.record(sides.into)
        return _Swapped(sides)

    def _out(self, sides: _Sides, left: Tensor, leaves: Tensor) -> None:
        with torch.cuda.stream(sides.out):
            left.copy_(_bytes(leaves), non_blocking=True)
            self._again(leaves.nbytes, out=True)

    def _in(self, sides: _Sides, arrives: Tensor, arriving: Tensor) -> None:
        with torch.cuda.stream(sides.into):
            _bytes(arrives).copy_(arriving, non_blocking=True)
            self._again(arrives.nbytes, out=False)

    def _again(self, nbytes: int, *, out: bool) -> None:
        """Bytes that a slower link would have needed the time for."""
        again = round(nbytes * self._extra[0]) + self._extra[1]
        if again and self._scratch:
            card, host = self._scratch[0 if out else 1], self._scratch[2].chunk(2)[0 if out else 1]
            while again > 0:
                n = min(again, _SCRATCH_BYTES)
                to, source = (host, card) if out else (card, host)
                to[:n].copy_(source[:n], non_blocking=True)
                again -= n

    def _swap_by_kernel(self, left: Tensor, leaves: Tensor, arrives: Tensor, arriving: Tensor) -> None:
        if self._sm_kernel is None:
            self._sm_kernel = torch.cuda._compile_kernel(_SM_KERNEL, "swap")
        n = leaves.nbytes // 16
        self._sm_kernel(
            grid=(2 * self.sm_blocks, 1, 1), block=(512, 1, 1), args=[left, leaves, n, arrives, arriving, n]
        )


WIRE = Wire()


class _Swapped(dist.Work):
    """A work that is under way on the wire's streams: waiting orders the current stream behind it, never the host."""

    def __init__(self, sides: _Sides, result: Any = None) -> None:
        super().__init__()
        self._sides, self.result_ = sides, result

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        current = torch.cuda.current_stream()
        current.wait_event(self._sides.left)
        current.wait_event(self._sides.arrived)
        return True

    def get_future(self) -> Future:
        self.wait()
        return _done(self.result_)


class _Done(dist.Work):
    """A work of a peer that agrees at once."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True

    def get_future(self) -> Future:
        return _done(self._result)


def _done(result: Any) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


class GhostProcessGroup(dist.ProcessGroup):
    """One rank of P. Tensors on the host are answered at once, as by peers that hold the same."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self._names = {"name": "", "desc": ""}

    def getBackendName(self) -> str:
        return NAME

    # A ProcessGroup written in Python keeps its own names; functional collectives look groups up by them.
    def setGroupName(self, name: str) -> None:
        self._names["name"] = name

    def getGroupName(self) -> str:
        return self._names["name"]

    def setGroupDesc(self, desc: str) -> None:
        self._names["desc"] = desc

    def getGroupDesc(self) -> str:
        return self._names["desc"]

    def _others(self) -> list[int]:
        return [j for j in range(self.size()) if j != self.rank()]

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        own = self.rank()
        if inputs[own].numel():
            outputs[own].copy_(inputs[own], non_blocking=True)
        if inputs[own].numel() and not inputs[own].is_cuda:
            for j in self._others():
                outputs[j].copy_(inputs[j])
            return _Done(outputs)
        return WIRE.swap([(inputs[j], outputs[j]) for j in self._others()])

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
                target.copy_(x) if not x.is_cuda or j == self.rank() else None
        if not inputs[0].is_cuda:
            return _Done(outputs)
        return WIRE.swap([(x, g[j]) for g, x in zip(outputs, inputs, strict=True) for j in self._others()])

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


def _bytes(x: Tensor) -> Tensor:
    assert x.is_contiguous()
    return x.view(-1).view(torch.uint8)


def _merged(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Neighbours in memory as one: for rank 0 all slots off the rank are a single copy each way."""
    runs: list[tuple[Tensor, Tensor]] = []
    for leaves, arrives in ((_bytes(a), _bytes(b)) for a, b in pairs if a.numel()):
        if runs and all(
            x.data_ptr() + x.nbytes == y.data_ptr() and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
            for x, y in zip(runs[-1], (leaves, arrives), strict=True)
        ):
            longer = leaves.nbytes + runs[-1][0].nbytes
            runs[-1] = (runs[-1][0].as_strided((longer,), (1,)), runs[-1][1].as_strided((longer,), (1,)))
        else:
            runs.append((leaves, arrives))
    return runs


def start(
    rank: int, ranks: int, device: torch.device, timeout: timedelta, store: dist.Store | None
) -> dist.ProcessGroup:
    """The default group of one rank of `ranks`; it answers control traffic itself."""
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
    "one card",
    True,
    start,
)
