"""Sequence shards to head shards and back, chunk by chunk, in buffers that are owned and reused.

Copies, per element of Q, K and V: one on the way out (pack: the peers' heads side by side). What arrives is used as it
lies: with the sequence outermost in every slot, the slots of all ranks join to `[S, B, 3, m, H]`, of which `q_BSmH` is
a view, for any batch size. Only where the kernel is slower on such views (CPU, several heads: deviation 5) is there a
second copy, heads first. The output, per element: none on the way out for batch 1 (the kernel's result is sent as it
lies), one otherwise, and one into its place in `out_BLNH`.

Chunk c owns its own region of each buffer, so that no chunk waits for another's buffer, and the whole is no larger than
what one-chunk Ulysses needs. Regions are used again as soon as they are free: what was sent makes room for the copy
heads first, and the regions that held a chunk's Q, K and V carry its output back.

A chunk whose queries are split into parts keeps each part's rows together (the i-th part of every rank's tokens), so
that a part arrives, is attended to and leaves by itself. It travels as K and V together and each part of Q alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.schedule.schedule import Schedule
from hcms.transport.slots import Slots, others


@dataclass(frozen=True)
class LayerShape:
    """The shape of one rank's attention inputs.

    Args:
        batch: B.
        local_tokens: L = S/P.
        heads: N, all heads.
        head_dim: H.
    """

    batch: int
    local_tokens: int
    heads: int
    head_dim: int


_WIDE = torch.complex128


def widened(x: Tensor) -> Tensor:
    """`x` seen in 16-byte elements: a GPU copies strided views of those 2-4x faster, with the bits as they are.

    Returns `x` itself where its head vectors are no multiple of 16 bytes, or begin between two.
    """
    try:
        return x.view(_WIDE)
    except RuntimeError:
        return x


def _of(x: Tensor, slots: slice) -> Tensor:
    """Some slots of a tensor; itself, without a view of it, where they are all."""
    return x if slots == slice(None) else x[slots]


class _View:
    """A tensor `[P, L, B, m, H]` that is copied to or from others of its shape, as wide as both allow."""

    def __init__(self, x: Tensor) -> None:
        self.plain, self.wide = x, widened(x)

    def copy_(self, source: _View, at: _Place, slots: slice = slice(None)) -> None:
        """Copy `slots` of a source's `at` into the same slots of this."""
        wide = source._is_wide and self._is_wide
        _of(self._as(wide), slots).copy_(source._as(wide)[slots, at.tokens, :, at.heads])

    def copy_to(self, target: _View, at: _Place, slots: slice = slice(None)) -> None:
        """Copy `slots` of this into a target's `at`."""
        wide = target._is_wide and self._is_wide
        target._as(wide)[slots, at.tokens, :, at.heads].copy_(_of(self._as(wide), slots))

    @property
    def _is_wide(self) -> bool:
        return self.wide is not self.plain

    def _as(self, wide: bool) -> Tensor:
        return self.wide if wide else self.plain


@dataclass(frozen=True)
class _Regions:
    """A chunk's memory, flat: what it is sent from, where it arrives, and the same of its output."""

    send: Tensor
    recv: Tensor
    send_back: Tensor
    recv_back: Tensor


@dataclass(frozen=True)
class _Place:
    """Where a chunk, or a part of one, lies in `x_PLBMH`."""

    tokens: slice
    heads: slice


@dataclass(frozen=True)
class _Message:
    """What one exchange carries. `t` counts its tensors, `l` its part of a rank's tokens."""

    slots: Slots  # send_PlBtmH, recv_PlBtmH
    place: _Place
    send: dict[str, _View]  # by tensor, send_PlBmH
    recv: dict[str, _View]
    arrived_BSmH: dict[str, Tensor]  # views of what was received
    heads_first_BSmH: dict[str, Tensor]  # where it is copied heads first; empty where it is used as it lies


@dataclass(frozen=True)
class _Return:
    """What one return carries: a part of a chunk's output."""

    slots: Slots  # send_PlBmH (where the kernel's own output cannot be sent), recv_PlBmH
    place: _Place
    recv: _View


@dataclass(frozen=True)
class _Chunk:
    """The views of one chunk, made once so that a warm call makes none."""

    messages: dict[tuple[str, int], _Message]
    returns: list[_Return]  # by part


class HeadExchange:
    """The exchanges of one layer shape over one schedule's cut.

    Buffers belong to this object and live as long as it does; they are handed between lanes by the edges of the
    schedule and never freed while a call is in flight. Nothing here waits on the host.

    Args:
        schedule: gives the cut, the parts, and whether Q, K and V travel packed or alone.
        ranks: P.
        shape: this rank's inputs.
        dtype, device: of the inputs.
        heads_first: copy arrived chunks of several heads to `[B, m, S, H]` (deviation 5).
        rank: this rank; asked for with `own_apart` only.
        own_apart: the own share is copied into its place when packing and when unpacking, and never sent.

    Raises:
        ValueError: more parts than a rank has tokens.
    """

    def __init__(
        self,
        schedule: Schedule,
        ranks: int,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        heads_first: bool = False,
        rank: int = 0,
        own_apart: bool = False,
    ) -> None:
        P, B, L, N, H = ranks, shape.batch, shape.local_tokens, shape.heads, shape.head_dim
        M = N // P
        assert N == P * M and sum(schedule.cut) == M
        if max(schedule.parts) > L:
            raise ValueError(f"{max(schedule.parts)} parts cannot be cut from a rank's {L} tokens")
        self.schedule = schedule
        self.ranks, self._rank, self._M, self._B, self._H = P, rank, M, B, H
        self._own_apart, self._heads_first = own_apart, heads_first
        self._others = others(rank, P) if own_apart else [slice(None)]
        self._own = slice(rank, rank + 1)
        per_head = P * B * L * H
        self._allocate(3 * M * per_head, dtype, device)
        together = {op.tensors for op in schedule.ops if op.kind == "exchange"}
        self._chunks = [
            self._chunk(
                slice(start, start + m),
                self._regions(3 * start * per_head, 3 * (start + m) * per_head),
                tokens=_split(L, parts),
                split=together == {"q", "k", "v"},
            )
            for start, m, parts in zip(schedule.chunk_starts, schedule.cut, schedule.parts, strict=True)
        ]
        self._inputs: dict[str, _View] = {}
        self._out: _View | None = None

    def _allocate(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the owned buffers, for `count` elements of Q, K and V of all heads."""
        self._buffers = [torch.empty(count, dtype=dtype, device=device) for _ in range(2)]

    def _regions(self, start: int, stop: int) -> _Regions:
        """A chunk's memory, where its Q, K and V are elements `start` to `stop`. The output takes the place of Q."""
        send, recv = (b[start:stop] for b in self._buffers)
        return _Regions(send, recv, send, recv)

    def _chunk(self, heads: slice, regions: _Regions, *, tokens: Sequence[slice], split: bool) -> _Chunk:
        """The views of a chunk in its regions: Q, or its parts, first."""
        send, recv = regions.send, regions.recv
        P, B, H, m = self.ranks, self._B, self._H, heads.stop - heads.start
        L = tokens[-1].stop
        whole = slice(0, L)
        a_token = P * B * m * H  # elements of one tensor, of one token of every rank
        if len(tokens) > 1:
            wanted = [("q", i, rows, rows.start * a_token) for i, rows in enumerate(tokens)]
            wanted.append(("kv", 0, whole, L * a_token))
        elif split:
            wanted = [(name, 0, whole, t * L * a_token) for t, name in enumerate("qkv")]
        else:
            wanted = [("qkv", 0, whole, 0)]
        messages = {}
        for tensors, part, rows, start in wanted:
            n, t = rows.stop - rows.start, len(tensors)
            region = slice(start, start + t * n * a_token)
            send_PlBtmH, recv_PlBtmH = (b[region].view(P, n, B, t, m, H) for b in (send, recv))
            heads_first = {}
            if self._heads_first and m > 1:
                # What lies in the send region has been sent before anything of this message was received.
                heads_first = dict(
                    zip(tensors, (x.transpose(1, 2) for x in send[region].view(t, B, m, P * n, H)), strict=True)
                )
            messages[tensors, part] = _Message(
                Slots(send_PlBtmH, recv_PlBtmH, self._rank, self._own_apart),
                _Place(rows, heads),
                {name: _View(send_PlBtmH[:, :, :, i]) for i, name in enumerate(tensors)},
                {name: _View(recv_PlBtmH[:, :, :, i]) for i, name in enumerate(tensors)},
                {name: recv_PlBtmH.view(P * n, B, t, m, H)[:, :, i].transpose(0, 1) for i, name in enumerate(tensors)},
                heads_first,
            )
        returns = []
        for rows in tokens:
            region = slice(rows.start * a_token, rows.stop * a_token)
            send_PlBmH, recv_PlBmH = (b[region].view(P, -1, B, m, H) for b in (regions.send_back, regions.recv_back))
            returns.append(
                _Return(
                    Slots(send_PlBmH, recv_PlBmH, self._rank, self._own_apart), _Place(rows, heads), _View(recv_PlBmH)
                )
            )
        return _Chunk(messages, returns)

    def bind(self, inputs_BLNH: dict[str, Tensor], out_BLNH: Tensor) -> None:
        """Take a call's tensors: `q`, `k` and `v` to be exchanged, and where the output goes. `release` drops them."""
        self._inputs = {name: self._by_rank(x_BLNH) for name, x_BLNH in inputs_BLNH.items()}
        self._out = self._by_rank(out_BLNH)

    def release(self) -> None:
        self._inputs, self._out = {}, None

    def _by_rank(self, x_BLNH: Tensor) -> _View:
        """`x_PLBMH`: the heads of each rank as a slot, a view."""
        return _View(x_BLNH.unflatten(2, (self.ranks, self._M)).permute(2, 1, 0, 3, 4))

    @property
    def nbytes(self) -> int:
        """Bytes of all owned buffers."""
        return sum(b.nbytes for b in self._buffers)

    def poison(self) -> None:
        """Fill every owned buffer with NaN, so that an element that is read before it is written shows."""
        for buffer in self._buffers:
            buffer.fill_(float("nan"))

    def pack(self, chunk: int, tensors: str, part: int = 0) -> None:
        """Copy a message's heads side by side, a slot a rank, on the current stream."""
        message = self._chunks[chunk].messages[tensors, part]
        for name in tensors:
            x = self._inputs[name]
            for slots in self._others:
                message.send[name].copy_(x, message.place, slots)
            if self._own_apart:
                message.recv[name].copy_(x, message.place, self._own)

    def pack_chunk(self, chunk: int) -> None:
        """Pack all that a chunk sends."""
        for tensors, part in self._chunks[chunk].messages:
            self.pack(chunk, tensors, part)

    def send(self, chunk: int, tensors: str, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        """Pack a chunk's heads and start their all-to-all on the current stream; returns the Work if asynchronous."""
        self.pack(chunk, tensors)
        return self.exchange(chunk, tensors, group, async_op)

    def exchange(
        self, chunk: int, tensors: str, group: dist.ProcessGroup, async_op: bool, part: int = 0
    ) -> dist.Work | None:
        """The all-to-all of a packed message alone."""
        return self._chunks[chunk].messages[tensors, part].slots.exchange(group, async_op)

    def receive(self, chunk: int, tensors: str, part: int = 0) -> None:
        """Make an arrived message ready for the kernel; nothing to do where it is used as it lies."""
        message = self._chunks[chunk].messages[tensors, part]
        for name, x_BSmH in message.heads_first_BSmH.items():
            x_BSmH.copy_(message.arrived_BSmH[name])

    def chunk_qkv(self, chunk: int, part: int = 0) -> list[Tensor]:
        """`q_BSmH, k_BTmH, v_BTmH` of an arrived chunk, q of one part: views of owned buffers, valid until the next
        call."""
        ready: dict[str, Tensor] = {}
        for (tensors, i), message in self._chunks[chunk].messages.items():
            if tensors != "q" or i == part:
                ready |= message.heads_first_BSmH or message.arrived_BSmH
        return [ready[name] for name in "qkv"]

    def sendable(self, chunk: int, o_BSmH: Tensor, part: int = 0) -> Tensor:
        """A kernel's result as it can be sent, `o_PlBmH`: itself, or copied into an owned buffer on the current
        stream."""
        back = self._chunks[chunk].returns[part].slots
        o_SBmH = o_BSmH.transpose(0, 1)
        if o_SBmH.is_contiguous():
            return o_SBmH.view_as(back.send)
        return back.send.copy_(o_SBmH.reshape(back.send.shape))

    def send_back(
        self, chunk: int, o_BSmH: Tensor, group: dist.ProcessGroup, async_op: bool, part: int = 0
    ) -> dist.Work | None:
        """Start the all-to-all of a chunk's output. The caller keeps `o_BSmH` alive until the Work is done."""
        back = self._chunks[chunk].returns[part].slots
        o_PlBmH = self.sendable(chunk, o_BSmH, part)
        return Slots(o_PlBmH, back.recv, back.rank, back.own_apart).exchange(group, async_op)

    def receive_back(self, chunk: int, part: int = 0, own_PlBmH: Tensor | None = None) -> None:
        """Put a returned chunk into its heads of the output; the own share from `own_PlBmH` where it was not sent."""
        assert self._out is not None
        back = self._chunks[chunk].returns[part]
        for slots in self._others:
            back.recv.copy_to(self._out, back.place, slots)
        if self._own_apart:
            assert own_PlBmH is not None
            _View(own_PlBmH).copy_to(self._out, back.place, self._own)


def _split(tokens: int, parts: int) -> list[slice]:
    """`tokens` in so many parts that differ by one at most."""
    edges = [tokens * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
