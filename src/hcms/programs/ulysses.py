"""Ulysses and HCMS: one program; the schedule makes the method."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from hcms.kernels import Kernel
from hcms.schedule.schedule import Op
from hcms.transport.layout import HeadExchange


class UlyssesProgram:
    """What `pack`, `exchange`, `attend`, `return` and `unpack` do, for one layer shape.

    Bound to a call's tensors by `bind`; `release` drops them once the caller's stream has waited for every lane.
    The kernel's outputs are allocated by the kernel on the stream that attends and kept alive here until then.
    """

    def __init__(self, exchange: HeadExchange, kernel: Kernel) -> None:
        self._exchange = exchange
        self._kernel = kernel
        self._copies_apart = exchange.schedule.copies_apart
        self._outputs_BSmH: dict[tuple[int, int], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the owned buffers."""
        return self._exchange.nbytes

    def poison(self) -> None:
        self._exchange.poison()

    def bind(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, out_BLNH: Tensor) -> None:
        self._exchange.bind({"q": q_BLNH, "k": k_BLNH, "v": v_BLNH}, out_BLNH)

    def release(self) -> None:
        self._exchange.release()
        self._outputs_BSmH.clear()

    def start(self, op: Op, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        exchange, chunk, part = self._exchange, op.chunk, op.part[0]
        match op.kind:
            case "pack":
                exchange.pack_chunk(chunk)
            case "exchange":
                if not self._copies_apart:
                    exchange.pack(chunk, op.tensors)
                return exchange.exchange(chunk, op.tensors, group, async_op, part)
            case "attend":
                o_BSmH = self._kernel.attend(*exchange.chunk_qkv(chunk, part))
                if self._copies_apart:  # a copy for sending needs SMs, so it belongs to the lane that has them
                    o_PlBmH = exchange.sendable(chunk, o_BSmH, part)
                    o_BSmH = o_PlBmH.flatten(0, 1).transpose(0, 1)
                self._outputs_BSmH[chunk, part] = o_BSmH
            case "return":
                return exchange.send_back(chunk, self._outputs_BSmH[chunk, part], group, async_op, part)
            case "unpack":
                o_SBmH = self._outputs_BSmH[chunk, part].transpose(0, 1)
                exchange.receive_back(chunk, part, o_SBmH.unflatten(0, (exchange.ranks, -1)))
        return None

    def finish(self, op: Op) -> None:
        if op.kind == "exchange":
            self._exchange.receive(op.chunk, op.tensors, op.part[0])
        elif op.kind == "return" and not self._copies_apart:
            self._exchange.receive_back(op.chunk)
