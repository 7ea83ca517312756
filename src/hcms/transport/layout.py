"""Sequence shards to head shards and back, chunk by chunk, in buffers that are owned and reused.

Copies, per element of Q, K and V: one on the way out (pack: the peers' heads side by side). What arrives is used as it
lies: with the sequence outermost in every slot, the slots of all ranks join to `[S, B, 3, m, H]`, of which `q_BSmH` is
a view, for any batch size. Only where the kernel is slower on such views (CPU, several heads: deviation 5) is there a
second copy, heads first. The output, per element: none on the way out for batch 1 (the kernel's result is sent as it
lies), one otherwise, and one into its place in `out_BLNH`.

Chunk c owns its own region of each buffer, so that no chunk waits for another's buffer, and the whole is no larger than
what one-chunk Ulysses needs. Regions are used again as soon as they are free: what was sent makes room for the copy
heads first, and the regions that held a chunk's Q, K and V carry its output back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.schedule.schedule import Schedule


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


class _Slots:
    """A tensor `[..., H]` that is copied to or from others of its shape, as wide as both allow."""

    def __init__(self, x: Tensor) -> None:
        self.plain, self.wide = x, widened(x)

    def copy_(self, source: _Slots, heads: slice) -> None:
        """Copy `heads` of a source `[P, L, B, M, H]` into all of this `[P, L, B, m, H]`."""
        self._pick(source).copy_(source._pick(self)[:, :, :, heads])

    def copy_to(self, target: _Slots, heads: slice) -> None:
        """Copy all of this into `heads` of a target."""
        target._pick(self)[:, :, :, heads].copy_(self._pick(target))

    def _pick(self, other: _Slots) -> Tensor:
        return self.wide if other.wide is not other.plain and self.wide is not self.plain else self.plain


@dataclass(frozen=True)
class _Chunk:
    """The views of one chunk, made once so that a warm call makes none. `t` is 3, or 1 for a tensor sent alone."""

    heads: slice  # this chunk's place among a rank's M heads
    packed: dict[str, tuple[Tensor, Tensor]]  # tensors -> send_PLBtmH, recv_PLBtmH
    slots: dict[str, list[_Slots]]  # tensors -> send_PLBmH of each of them
    arrived_3BSmH: list[Tensor]  # q, k, v as views of what was received
    heads_first_3BSmH: list[Tensor] | None  # q, k, v copied heads first, as views
    o_send_SBmH: Tensor
    o_recv_PLBmH: Tensor
    o_slots: _Slots  # o_recv_PLBmH


class HeadExchange:
    """The exchanges of one layer shape over one schedule's cut.

    Buffers belong to this object and live as long as it does; they are handed between lanes by the edges of the
    schedule and never freed while a call is in flight. Nothing here waits on the host.

    Args:
        schedule: gives the cut, and whether Q, K and V travel packed or alone.
        ranks: P.
        shape: this rank's inputs.
        dtype, device: of the inputs.
        heads_first: copy arrived chunks of several heads to `[B, m, S, H]` (deviation 5).
    """

    def __init__(
        self,
        schedule: Schedule,
        ranks: int,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        heads_first: bool,
    ) -> None:
        P, B, L, N, H = ranks, shape.batch, shape.local_tokens, shape.heads, shape.head_dim
        S, M = P * L, N // P
        assert N == P * M and sum(schedule.cut) == M
        self._ranks, self._M = P, M
        per_head = P * B * L * H
        self._buffers = [torch.empty(3 * M * per_head, dtype=dtype, device=device) for _ in range(2)]
        sent_together = {op.tensors for op in schedule.ops if op.kind == "exchange"}
        self._chunks: list[_Chunk] = []
        for start, m in zip(schedule.chunk_starts, schedule.cut, strict=True):
            send, recv = (b[3 * start * per_head : 3 * (start + m) * per_head] for b in self._buffers)
            packed: dict[str, tuple[Tensor, Tensor]] = {}
            if "qkv" in sent_together:
                packed["qkv"] = (send.view(P, L, B, 3, m, H), recv.view(P, L, B, 3, m, H))
                arrived = [packed["qkv"][1].view(S, B, 3, m, H)[:, :, t].transpose(0, 1) for t in range(3)]
            else:
                for t, name in enumerate("qkv"):
                    packed[name] = (send.view(3, P, L, B, 1, m, H)[t], recv.view(3, P, L, B, 1, m, H)[t])
                arrived = [packed[name][1].view(S, B, m, H).transpose(0, 1) for name in "qkv"]
            heads_first_views = None
            if heads_first and m > 1:
                # Tensor t's part of the send region was sent before t was received, whether packed or alone.
                heads_first_views = [x.transpose(1, 2) for x in send.view(3, B, m, S, H)]
            self._chunks.append(
                _Chunk(
                    slice(start, start + m),
                    packed,
                    {
                        tensors: [_Slots(send_PLBtmH[:, :, :, t]) for t in range(len(tensors))]
                        for tensors, (send_PLBtmH, _) in packed.items()
                    },
                    arrived,
                    heads_first_views,
                    send[: m * per_head].view(S, B, m, H),
                    recv[: m * per_head].view(P, L, B, m, H),
                    _Slots(recv[: m * per_head].view(P, L, B, m, H)),
                )
            )

        self._inputs: dict[str, _Slots] = {}
        self._out: _Slots | None = None

    def bind(self, inputs_BLNH: dict[str, Tensor], out_BLNH: Tensor) -> None:
        """Take a call's tensors: `q`, `k` and `v` to be exchanged, and where the output goes. `release` drops them."""
        self._inputs = {name: self._by_rank(x_BLNH) for name, x_BLNH in inputs_BLNH.items()}
        self._out = self._by_rank(out_BLNH)

    def release(self) -> None:
        self._inputs, self._out = {}, None

    def _by_rank(self, x_BLNH: Tensor) -> _Slots:
        """`x_PLBMH`: the heads of each rank as a slot, a view."""
        return _Slots(x_BLNH.unflatten(2, (self._ranks, self._M)).permute(2, 1, 0, 3, 4))

    @property
    def nbytes(self) -> int:
        """Bytes of all owned buffers."""
        return sum(b.nbytes for b in self._buffers)

    def poison(self) -> None:
        """Fill every owned buffer with NaN, so that an element that is read before it is written shows."""
        for buffer in self._buffers:
            buffer.fill_(float("nan"))

    def pack(self, chunk: int, tensors: str) -> None:
        """Copy a chunk's heads side by side, a slot a rank, on the current stream."""
        c = self._chunks[chunk]
        for name, send_PLBmH in zip(tensors, c.slots[tensors], strict=True):
            send_PLBmH.copy_(self._inputs[name], c.heads)

    def send(self, chunk: int, tensors: str, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        """Pack a chunk's heads and start their all-to-all on the current stream; returns the Work if asynchronous."""
        self.pack(chunk, tensors)
        return self.exchange(chunk, tensors, group, async_op)

    def exchange(self, chunk: int, tensors: str, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        """The all-to-all of a packed chunk alone."""
        send_PLBtmH, recv_PLBtmH = self._chunks[chunk].packed[tensors]
        return dist.all_to_all_single(recv_PLBtmH, send_PLBtmH, group=group, async_op=async_op)

    def receive(self, chunk: int, tensors: str) -> None:
        """Make an arrived chunk ready for the kernel; nothing to do where it is used as it lies."""
        c = self._chunks[chunk]
        if c.heads_first_3BSmH is not None:
            for name in tensors:
                t = "qkv".index(name)
                c.heads_first_3BSmH[t].copy_(c.arrived_3BSmH[t])

    def chunk_qkv(self, chunk: int) -> list[Tensor]:
        """`q_BSmH, k_BSmH, v_BSmH` of an arrived chunk: views of owned buffers, valid until the next call."""
        c = self._chunks[chunk]
        return c.arrived_3BSmH if c.heads_first_3BSmH is None else c.heads_first_3BSmH

    def send_back(self, chunk: int, o_BSmH: Tensor, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        """Start the all-to-all of a chunk's output. The caller keeps `o_BSmH` alive until the Work is done."""
        c = self._chunks[chunk]
        o_SBmH = o_BSmH.transpose(0, 1)
        if not o_SBmH.is_contiguous():
            o_SBmH = c.o_send_SBmH.copy_(o_SBmH)
        return dist.all_to_all_single(c.o_recv_PLBmH, o_SBmH.view_as(c.o_recv_PLBmH), group=group, async_op=async_op)

    def receive_back(self, chunk: int) -> None:
        """Put a returned chunk into its heads of the output."""
        assert self._out is not None
        c = self._chunks[chunk]
        c.o_slots.copy_to(self._out, c.heads)
