"""What a warm call costs the host, counted and not clocked: operations, copies, collectives and allocations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hcms_lab.measure.machinery import FreeAttention, Operations, free_link, small_inputs
from hcms_lab.measure.memory import allocations

pytestmark = pytest.mark.t1

RANKS, HEADS_A_RANK = 2, 4
CASES = [
    ("ulysses", "4"),
    ("ulysses-packed", "4"),
    *((m, plan) for m in ("hcms-serial", "hcms", "hcms-3lane") for plan in ("4", "2-2", "1-2-1", "1-1-1-1")),
]
# By the counts of this code: views of the caller's tensors, then a chunk's own operations. Fewer is better.
A_CALL = 13
A_CHUNK = 12
HEADS_FIRST = 3  # more for a chunk of several heads, on CPU


@pytest.fixture(scope="module", autouse=True)
def on_a_free_link() -> Iterator[None]:
    with free_link(RANKS), torch.inference_mode():
        yield


@pytest.mark.parametrize(("method", "plan"), CASES)
def test_a_warm_call_does_no_more_than_it_must(method: str, plan: str) -> None:
    x = small_inputs(RANKS * HEADS_A_RANK)
    attention = FreeAttention(method, plan)
    attention(**x)
    with Operations() as operations:
        attention(**x)
    assert attention.schedule is not None
    cut = attention.schedule.cut
    copied = sum(m > 1 for m in cut)
    counts = operations.counts
    # Pack Q, K and V, put the output into its place; heads first where several heads share a chunk.
    assert counts["aten.copy_"] == 4 * len(cut) + 3 * copied
    assert counts["c10d.alltoall_base_"] == (4 if method == "ulysses" else 2 * len(cut))
    split = 2 if method == "ulysses" else 0  # two collectives more
    assert counts.total() <= A_CALL + A_CHUNK * len(cut) + HEADS_FIRST * copied + split


@pytest.mark.parametrize(("method", "plan"), CASES)
def test_a_warm_call_allocates_its_output_and_nothing_else(method: str, plan: str) -> None:
    x = small_inputs(RANKS * HEADS_A_RANK)
    attention = FreeAttention(method, plan)
    attention(**x)
    assert [nbytes for nbytes in allocations(lambda: attention(**x)) if nbytes > 0] == [x["q_BLNH"].nbytes]


def test_chunks_need_no_more_buffers_than_ulysses() -> None:
    x = small_inputs(RANKS * HEADS_A_RANK)
    nbytes = {}
    for method, plan in CASES:
        attention = FreeAttention(method, plan)
        attention(**x)
        nbytes[method, plan] = attention.buffer_bytes
    # Sent and received, three tensors each; the copy heads first takes no room of its own.
    assert set(nbytes.values()) == {6 * x["q_BLNH"].nbytes}
