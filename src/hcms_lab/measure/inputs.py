"""Inputs that every rank can remake, and what full attention gives on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hcms.kernels import attend_full, kernel
from hcms_lab.measure.cases import Point

SETS = 2  # inputs alternate between timed calls, so that a result left over from the call before shows
_CHECK_OPERATIONS = 4e9  # how much of the output is checked against float64: all of it where that is this cheap
_HEADS_AT_ONCE = 8


def shard(point: Point, seed: int, input_set: int, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Rank `rank`'s q, k, v `[B, L, N, H]` of an input set. Any rank can make any other's."""
    generator = torch.Generator(device).manual_seed((seed * SETS + input_set) * 1009 + rank)
    size = (point.batch, point.seq_len // point.ranks, point.heads, point.head_dim)
    dtype = getattr(torch, point.dtype)
    return {t: torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype) for t in "qkv"}


@dataclass(frozen=True)
class Reference:
    """Full attention in float64 on some of this rank's tokens, and the plain kernel's own error there.

    Args:
        rows: the local tokens that are checked; all of them at small sizes.
        o_BRNH: the answer, float64.
        kernel_max_abs_err: error of the kernel on one rank with no exchange, in the run's dtype.
        bound: what a method's error may be: twice the kernel's own, and two roundings of the result (which a ring's
            partial results cost).
    """

    rows: Tensor
    o_BRNH: Tensor
    kernel_max_abs_err: float
    bound: float

    def error(self, out_BLNH: Tensor) -> float:
        """Largest absolute error of an output on the checked rows; infinite where it is not finite."""
        error = (out_BLNH[:, self.rows].double() - self.o_BRNH).abs().max().item()
        return error if math.isfinite(error) else math.inf


def reference(point: Point, seed: int, input_set: int, rank: int, device: torch.device) -> Reference:
    """Make the whole K and V again on this rank, alone, and attend to them with some of its queries."""
    L = point.seq_len // point.ranks
    a_row = 4 * point.batch * point.seq_len * point.heads * point.head_dim
    count = max(16, min(L, int(_CHECK_OPERATIONS / a_row)))
    count = min(count, L)
    rows = torch.linspace(0, L - 1, count, device=device).round().long().unique()
    shards = [shard(point, seed, input_set, r, device) for r in range(point.ranks)]
    q_BRNH = shards[rank]["q"][:, rows]
    k_BSNH, v_BSNH = (torch.cat([s[t] for s in shards], dim=1) for t in "kv")
    # A few heads at a time: float64 copies of a whole sequence would not fit beside the methods' buffers.
    o_BRNH = torch.cat(
        [
            attend_full(*(x[:, :, start : start + _HEADS_AT_ONCE] for x in (q_BRNH, k_BSNH, v_BSNH)))
            for start in range(0, point.heads, _HEADS_AT_ONCE)
        ],
        dim=2,
    )
    plain_BRNH = kernel(point.kernel).attend(q_BRNH, k_BSNH, v_BSNH)
    plain_error = (plain_BRNH.double() - o_BRNH).abs().max().item()
    rounding = torch.finfo(q_BRNH.dtype).eps / 2 * o_BRNH.abs().max().item()
    return Reference(rows, o_BRNH, plain_error, 2 * plain_error + 2 * rounding)
