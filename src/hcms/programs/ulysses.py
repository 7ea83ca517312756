"""Ulysses and HCMS: one program; the schedule makes the method."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from hcms.kernels import Kernel
from hcms.schedule.schedule import Op
from hcms.transport.layout import HeadExchange


class UlyssesProgram:
    """What `exchange`, `attend` and `return` do, for one layer shape.

    Bound to a call's tensors by `bind`; `release` drops them once the caller's stream has waited for every lane.
    The kernel's outputs are allocated by the kernel on the caller's stream and kept alive here until then.
    """

    def __init__(self, exchange: HeadExchange, kernel: Kernel) -> None:
        self._exchange = exchange
        self._kernel = kernel
        self._outputs_BSmH: dict[int, Tensor] = {}

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
        if op.kind == "exchange":
            return self._exchange.send(op.chunk, op.tensors, group, async_op)
        if op.kind == "attend":
            self._outputs_BSmH[op.chunk] = self._kernel.attend(*self._exchange.chunk_qkv(op.chunk))
            return None
        return self._exchange.send_back(op.chunk, self._outputs_BSmH[op.chunk], group, async_op)

    def finish(self, op: Op) -> None:
        if op.kind == "exchange":
            self._exchange.receive(op.chunk, op.tensors)
        elif op.kind == "return":
            self._exchange.receive_back(op.chunk)
