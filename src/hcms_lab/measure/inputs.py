"""Inputs that every rank can remake, and what full attention gives on them.

On a real link the whole sequence is every rank's own shard, one after the other. Over the ghost link, where peers are
memory, it is the consistent world of `hcms.links.ghost`: this rank's heads in P groups, each the tokens of a rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hcms.kernels import attend_full, kernel
from hcms_lab.measure.cases import Point

SETS = 2  # inputs alternate between rounds, so that a result left over from the round before shows
# How much of the output is checked against float64: all of it where that is this cheap, 16 rows at least.
_CHECK_OPERATIONS = {"cpu": 4e9, "cuda": 4e11}
_HEADS_AT_ONCE = 8


@dataclass(frozen=True)
class World:
    """The inputs of all ranks as one rank sees them.

    Args:
        point, seed: what the inputs are made of.
        rank: this rank.
        device: where they are made.
        ghost: whether peers are memory.
    """

    point: Point
    seed: int
    rank: int
    device: torch.device
    ghost: bool

    def shard(self, input_set: int, rank: int | None = None) -> dict[str, Tensor]:
        """A rank's q, k, v `[B, L, N, H]` of an input set. Any rank can make any other's on a real link."""
        point, rank = self.point, self.rank if rank is None else rank
        generator = torch.Generator(self.device).manual_seed((self.seed * SETS + input_set) * 1009 + rank)
        size = (point.batch, point.seq_len // point.ranks, point.heads, point.head_dim)
        dtype = getattr(torch, point.dtype)
        return {
            t: torch.randn(size, generator=generator, device=self.device, dtype=torch.float32).to(dtype) for t in "qkv"
        }

    def by_tokens(self, x_BLNH: Tensor) -> Tensor:
        """`x_BSMH`: head groups of a ghost's shard as tokens of its world, or rows of them where L is some rows."""
        P = self.point.ranks
        return x_BLNH.unflatten(2, (P, -1)).movedim(2, 1).flatten(1, 2)

    def own_heads(self, input_set: int) -> list[Tensor]:
        """`q_BSMH`, `k_BSMH`, `v_BSMH`: all tokens of this rank's heads, as its attention sees them."""
        if self.ghost:
            return [self.by_tokens(x).contiguous() for x in self.shard(input_set).values()]
        M = self.point.heads_a_rank
        heads = slice(self.rank * M, (self.rank + 1) * M)
        shards = [self.shard(input_set, r) for r in range(self.point.ranks)]
        return [torch.cat([s[t][:, :, heads] for s in shards], dim=1) for t in "qkv"]


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


def reference(world: World, input_set: int) -> Reference:
    """Make the whole K and V again on this rank, alone, and attend to them with some of its queries."""
    point, device = world.point, world.device
    L = point.seq_len // point.ranks
    a_row = 4 * point.batch * point.seq_len * point.heads * point.head_dim
    count = min(L, max(16, int(_CHECK_OPERATIONS[device.type] / a_row)))
    rows = torch.linspace(0, L - 1, count, device=device).round().long().unique()
    q_BRNH = world.shard(input_set)["q"][:, rows]
    if world.ghost:
        k, v = (world.by_tokens(world.shard(input_set)[t]) for t in "kv")
        q = world.by_tokens(q_BRNH)
    else:
        shards = [world.shard(input_set, r) for r in range(point.ranks)]
        k, v = (torch.cat([s[t] for s in shards], dim=1) for t in "kv")
        q = q_BRNH
    # A few heads at a time: float64 copies of a whole sequence would not fit beside the methods' buffers.
    o = torch.cat(
        [
            attend_full(*(x[:, :, start : start + _HEADS_AT_ONCE] for x in (q, k, v)))
            for start in range(0, q.shape[2], _HEADS_AT_ONCE)
        ],
        dim=2,
    )
    plain_error = (kernel(point.kernel).attend(q, k, v).double() - o).abs().max().item()
    rounding = torch.finfo(q.dtype).eps / 2 * o.abs().max().item()
    o_BRNH = o.unflatten(1, (point.ranks, -1)).movedim(1, 2).flatten(2, 3) if world.ghost else o
    return Reference(rows, o_BRNH, plain_error, 2 * plain_error + 2 * rounding)
