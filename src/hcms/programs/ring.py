"""Ring Attention: K and V travel round the ranks while each attends with its own Q.

Each step attends to one rank's K and V and merges by log-sum-exp in float32. K and V live in two owned buffers; the
next step's arrive in one while this step's are read from the other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.kernels import Kernel
from hcms.schedule.schedule import Op
from hcms.transport.layout import LayerShape


class _SentAndReceived(dist.Work):
    """The two works of a rotation as one."""

    def __init__(self, works: list[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout=None) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        for work in self._works:
            work.wait()
        return True


class RingProgram:
    """What `rotate` and `attend` do, for one layer shape.

    Args:
        ranks, rank: P and this rank's place in the group.
        shape: this rank's inputs.
        dtype, device: of the inputs.
        kernel: must give its log-sum-exp.
    """

    def __init__(
        self, ranks: int, rank: int, shape: LayerShape, dtype: torch.dtype, device: torch.device, kernel: Kernel
    ) -> None:
        assert kernel.attend_lse is not None
        self._ranks, self._rank = ranks, rank
        self._attend_lse = kernel.attend_lse
        B, L, N, H = shape.batch, shape.local_tokens, shape.heads, shape.head_dim
        self._kv_2BLNH = [torch.empty(2, B, L, N, H, dtype=dtype, device=device) for _ in range(min(2, ranks))]
        self._merged_BLNH = torch.empty(B, L, N, H, dtype=torch.float32, device=device)
        self._lse_BNL = torch.empty(B, N, L, dtype=torch.float32, device=device)
        self._q_BLNH: Tensor | None = None
        self._out_BLNH: Tensor | None = None
        # Only what a step in flight still reads; kept until the caller's stream has waited.
        self._inputs_BLNH: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the owned buffers."""
        return sum(t.nbytes for t in (*self._kv_2BLNH, self._merged_BLNH, self._lse_BNL))

    def poison(self) -> None:
        for buffer in (*self._kv_2BLNH, self._merged_BLNH, self._lse_BNL):
            buffer.fill_(float("nan"))

    def bind(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, out_BLNH: Tensor) -> None:
        # Kernels read these as they are and want contiguous head vectors, which nearly every caller has.
        q_BLNH, k_BLNH, v_BLNH = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BLNH, k_BLNH, v_BLNH))
        self._inputs_BLNH = (k_BLNH, v_BLNH)
        self._q_BLNH, self._out_BLNH = q_BLNH, out_BLNH

    def release(self) -> None:
        self._q_BLNH = self._out_BLNH = None
        self._inputs_BLNH = ()

    def start(self, op: Op, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        if op.kind == "attend":
            self._attend(op.chunk)
            return None
        if op.chunk == 0:
            for t, x_BLNH in enumerate(self._inputs_BLNH):
                self._kv_2BLNH[0][t].copy_(x_BLNH)
        after, before = ((self._rank + d) % self._ranks for d in (1, -1))
        leaving, arriving = self._kv_2BLNH[op.chunk % 2], self._kv_2BLNH[(op.chunk + 1) % 2]
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, leaving, group=group, group_peer=after),
                dist.P2POp(dist.irecv, arriving, group=group, group_peer=before),
            ]
        )
        return _SentAndReceived(works)

    def finish(self, op: Op) -> None:
        """Nothing: a rotation arrives where it is read."""

    def _attend(self, step: int) -> None:
        assert self._q_BLNH is not None and self._out_BLNH is not None
        # Step 0 reads the caller's own K and V, so that it waits for no copy made on the communication lane.
        k_BLNH, v_BLNH = self._inputs_BLNH if step == 0 else self._kv_2BLNH[step % 2]
        o_BLNH, lse_BNL = self._attend_lse(self._q_BLNH, k_BLNH, v_BLNH)
        lse_BNL = lse_BNL.float()
        if step == 0:
            self._merged_BLNH.copy_(o_BLNH)
            self._lse_BNL.copy_(lse_BNL)
        else:
            # merged + (o - merged) * share of o in the sum of both, all in float32
            share_BLN1 = torch.sigmoid(lse_BNL - self._lse_BNL).transpose(1, 2).unsqueeze(-1)
            self._merged_BLNH.lerp_(o_BLNH.float(), share_BLN1)
            torch.logaddexp(self._lse_BNL, lse_BNL, out=self._lse_BNL)
        if step == self._ranks - 1:
            self._out_BLNH.copy_(self._merged_BLNH)
