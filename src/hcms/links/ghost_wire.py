"""The ghost link's wire: a card's own PCIe, both directions at once, and pinned memory in place of peers.

See `hcms.links.ghost` for what it stands for.
"""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

_ALIGN = 256
_SCRATCH_BYTES = 64 << 20
_SPOILT = 0xA5


@dataclass(frozen=True)
class _Sides:
    """The streams of the works that are issued from one stream: what leaves, what arrives; and an event each way.

    Each calling stream has its own: shared, two lanes' works would queue behind each other.
    """

    caller: torch.cuda.Stream
    out: torch.cuda.Stream
    into: torch.cuda.Stream
    ready: torch.cuda.Event
    left: torch.cuda.Event
    arrived: torch.cuda.Event

    @staticmethod
    def of(caller: torch.cuda.Stream) -> _Sides:
        out, into = (torch.cuda.Stream(priority=-1) for _ in range(2))
        ready, left, arrived = (torch.cuda.Event() for _ in range(3))
        return _Sides(caller, out, into, ready, left, arrived)

    @contextmanager
    def on(self, side: torch.cuda.Stream) -> Iterator[None]:
        """Work of one side. `torch.cuda.stream` would ask for the device and its stream each time: 10 us a copy."""
        torch.cuda.set_stream(side)
        try:
            yield
        finally:
            torch.cuda.set_stream(self.caller)


class Wire:
    """The card's way to its host: pinned memory that holds what leaves, what should have, and what arrives.

    `engine` says what moves the bytes: `copy` engines, or a kernel on SMs (`sm`): an exchange's on the calling stream,
    as NCCL's; a send's and a receive's beside it, a stream a way.
    """

    def __init__(self) -> None:
        self.engine: Literal["copy", "sm"] = "copy"
        self.mode: Literal["prepare", "replay", "answer"] = "prepare"
        self.sent_bytes = 0
        self._heads = 0
        self._expected = self._left = self._arriving = torch.empty(0, dtype=torch.uint8)
        self._out_at = self._in_at = 0
        self._prepared_out_at = self._prepared_in_at = 0
        self._extra = (0.0, 0)  # bytes sent again for each byte, and for each work
        self._scratch: tuple[Tensor, Tensor, Tensor] | None = None
        self._sides: dict[int, _Sides] = {}
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
            native_gbps: what there is, both directions at once; the default is PCIe 5's, and where there is less the
                link comes out slower than `gbps`.
            latency_us: as much more time a work.

        Raises:
            ValueError: a bandwidth that is not positive or above what there is, or a negative latency; either where a
                kernel moves the bytes.
        """
        if self.engine == "sm" and (gbps is not None or latency_us):
            raise ValueError("a ghost link that a kernel drives takes no gbps and no latency_us")
        if gbps is not None and not 0 < gbps <= native_gbps:
            raise ValueError(f"a ghost link can be slowed to at most {native_gbps:g} GB/s, got {gbps}")
        if latency_us < 0:
            raise ValueError(f"a ghost link needs a latency of at least 0 µs, got {latency_us}")
        self._extra = (native_gbps / gbps - 1 if gbps else 0.0, round(latency_us * native_gbps * 1e3))
        if self._extra != (0.0, 0) and self._scratch is None:
            size = _SCRATCH_BYTES
            out, into = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
            self._scratch = (out, into, torch.empty(2 * size, dtype=torch.uint8, pin_memory=True))

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

    def answer(self) -> None:
        """From now on, works are answered as peers do that were sent it, past what was laid, which stays.

        For what a model does between its laid calls, such as gathering its output. At no pace of a link.
        """
        self.mode = "answer"
        # A replayed graph moves no place on the host: the prepared pass says where what was laid ends.
        self._out_at, self._in_at = self._prepared_out_at, self._prepared_in_at

    def spoil(self) -> None:
        """Overwrite what left, so that bytes that do not leave in the next replay show. Waits for the card."""
        self._wait_for_card()  # bytes of calls before may still be on their way out, and would cover this
        self._left[: self._prepared_out_at].fill_(_SPOILT)

    def wrong_bytes(self) -> int:
        """Of what left in the replayed pass, the bytes that are not what should have. Waits for the card."""
        self._wait_for_card()
        n = self._prepared_out_at
        if torch.equal(self._left[:n], self._expected[:n]):
            return 0
        return int((self._left[:n] != self._expected[:n]).sum())

    def swap(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Swapped:
        """Send and receive: for each pair `(leaves, arrives)`, contiguous tensors on the card, of as many bytes.

        Issued from the current stream, which the work's `wait` orders behind both directions.
        """
        sides = self._forked()
        for leaves, arrives in _merged(pairs):
            left, arriving = self._out_place(leaves), self._in_place(arrives)
            if self.mode != "replay":
                self._lay(left, leaves)
                arriving.copy_(_bytes(leaves), non_blocking=True)
                _bytes(arrives).copy_(arriving, non_blocking=True)
            elif self.engine == "sm":  # on the calling stream, whose SMs may be communication's own
                _move((left, leaves), (arrives, arriving))
            else:
                self._out(sides, left, leaves)
                self._in(sides, arrives, arriving)
        return self._joined(sides, by=sides.caller if self.engine == "sm" else None)

    def send(self, leaves: Tensor) -> Swapped:
        sides = self._forked()
        self.last_sent = leaves
        left = self._out_place(leaves)
        if self.mode != "replay":
            self._lay(left, leaves)
        else:
            self._out(sides, left, leaves)
        return self._joined(sides)

    def receive(self, arrives: Tensor) -> Swapped:
        """What a peer passes on: this rank's own last message, its heads turned by one rank's."""
        sides = self._forked()
        arriving = self._in_place(arrives)
        if self.mode != "replay":
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
        at, end = left.storage_offset(), left.storage_offset() + left.nbytes
        self._expected[at:end].copy_(_bytes(leaves), non_blocking=True)
        self._expected[end : -(-end // _ALIGN) * _ALIGN].fill_(_SPOILT)  # where nothing will have gone
        left.copy_(_bytes(leaves), non_blocking=True)

    def _wait_for_card(self) -> None:
        torch.cuda.synchronize()

    # ---- the card's two directions -----------------------------------------------------------------------------------

    def _forked(self) -> _Sides:
        current = torch.cuda.current_stream()
        sides = self._sides.get(current.cuda_stream)
        if sides is None:
            sides = self._sides[current.cuda_stream] = _Sides.of(current)
        # What leaves was made, and the memory that is written was last read, by the calling stream or before it.
        sides.ready.record(current)
        sides.out.wait_event(sides.ready)
        sides.into.wait_event(sides.ready)
        return sides

    def _joined(self, sides: _Sides, *, by: torch.cuda.Stream | None = None) -> Swapped:
        """The work that ends with both sides, or with stream `by` where that carried it."""
        sides.left.record(by or sides.out)
        sides.arrived.record(by or sides.into)
        return Swapped(sides)

    def _out(self, sides: _Sides, left: Tensor, leaves: Tensor) -> None:
        with sides.on(sides.out):
            if self.engine == "sm":
                return _move((left, _bytes(leaves)), None)
            left.copy_(_bytes(leaves), non_blocking=True)
            self._again(leaves.nbytes, out=True)

    def _in(self, sides: _Sides, arrives: Tensor, arriving: Tensor) -> None:
        with sides.on(sides.into):
            if self.engine == "sm":
                return _move(None, (_bytes(arrives), arriving))
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


WIRE = Wire()


class Swapped(dist.Work):
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
        return done(self.result_)


def done(result: Any) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future


def _move(out: tuple[Tensor, Tensor] | None, into: tuple[Tensor, Tensor] | None) -> None:
    from hcms.links.ghost_kernel import move  # imports Triton, which nothing else here needs

    move(out, into)


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
