"""Ring Attention: partial results merged by log-sum-exp, whatever the scores and whichever rank holds the keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from ranks import Place, error_bound, largest, on_ranks, own, whole_qkv

pytestmark = pytest.mark.t1


def scores(place: Place, kind: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of which the softmax is hard to merge."""
    q_BSNH, k_BSNH, v_BSNH = whole_qkv((2, 4 * place.ranks, 3, 32), dtype, seed=1)
    if kind == "one rank's keys outweigh all":
        k_BSNH[:, -4:] = 20 * q_BSNH.mean(dim=1, keepdim=True) + k_BSNH[:, -4:]
        q_BSNH = 5 * q_BSNH
    elif kind == "hundreds apart":
        q_BSNH = 20 * q_BSNH
    elif kind == "all equal":
        k_BSNH = torch.zeros_like(k_BSNH)
    elif kind == "values far from zero":
        v_BSNH = v_BSNH + 100
    return [q_BSNH, k_BSNH, v_BSNH]


def ring_error(place: Place, kind: str, dtype: torch.dtype, kernel: str) -> tuple[float, float]:
    whole = scores(place, kind, dtype)
    exact_BSNH, bound = error_bound(whole, kernel)
    inputs = [own(place, x) for x in whole]
    attention = SequenceParallelAttention(place.gloo, "ring", kernel=kernel)
    attention.layer(*inputs)
    attention.poison()
    return largest(attention(*inputs).double() - own(place, exact_BSNH)), bound


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kind", ["usual", "one rank's keys outweigh all", "hundreds apart", "all equal", "values far from zero"]
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_merging(ranks: int, kind: str, dtype: torch.dtype, kernel: str) -> None:
    """Three heads on two or four ranks: unlike the others, ring needs no heads that the ranks divide."""
    for error, bound in on_ranks(ranks, ring_error, kind, dtype, kernel):
        assert error <= bound


def rotations(place: Place) -> dict[str, object]:
    inputs = [own(place, x) for x in whole_qkv((1, 8 * place.ranks, 2, 16), torch.float32)]
    attention = SequenceParallelAttention(place.emulated, "ring", record_timeline=True)
    out_BLNH = attention(*inputs)
    assert attention.timeline is not None
    return {
        "ops": [(span.op.kind, span.op.chunk) for span in attention.timeline.spans],
        "buffers": attention.buffer_bytes,
        "finite": math.isfinite(largest(out_BLNH)),
        "a rank's tensor": inputs[0].nbytes,
        "log-sum-exp": inputs[0].nbytes // 16,
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rotation_is_sent_before_the_attention_that_hides_it(ranks: int) -> None:
    for seen in on_ranks(ranks, rotations):
        expected = [op for step in range(ranks - 1) for op in (("rotate", step), ("attend", step))]
        assert seen["ops"] == [*expected, ("attend", ranks - 1)]
        assert seen["finite"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_does_not_grow_with_ranks(ranks: int) -> None:
    """Two K and V pairs (one on a single rank), the merged output in float32, and its log-sum-exp."""
    for seen in on_ranks(ranks, rotations):
        tensor, lse = seen["a rank's tensor"], seen["log-sum-exp"]
        assert seen["buffers"] == 2 * min(2, ranks) * tensor + tensor + lse  # pyright: ignore[reportOperatorIssue]
