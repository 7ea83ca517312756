"""What travels: which heads arrive where, in how many collectives of what size, and at no allocation when warm."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.kernels import Kernel
from hcms.methods import METHODS
from hcms.schedule.schedule import Schedule, serial
from hcms.transport.layout import HeadExchange, LayerShape, widened
from hcms_lab.measure.memory import allocations, peak_bytes
from ranks import Collectives, Place, on_ranks, own, whole_qkv

pytestmark = pytest.mark.t1

B, L, M, H = 2, 6, 5, 16


def labelled(place: Place) -> dict[str, Tensor]:
    """This rank's q, k, v, every element its own number: where it stood in the whole q, k, v `[B, S, N, H]`."""
    shape_BSNH = (B, L * place.ranks, M * place.ranks, H)
    count = torch.Size(shape_BSNH).numel()
    return {
        name: own(place, torch.arange(t * count, (t + 1) * count, dtype=torch.float32).view(shape_BSNH))
        for t, name in enumerate("qkv")
    }


def there_and_back(place: Place, schedule: Schedule, heads_first: bool) -> dict[str, bool]:
    """Every chunk there, its q sent back as if it were the output: each element must come to its place and back."""
    P = place.ranks
    shape = LayerShape(B, L, M * P, H)
    exchange = HeadExchange(schedule, P, shape, torch.float32, place.device, heads_first=heads_first)
    exchange.poison()
    inputs_BLNH = labelled(place)
    out_BLNH = torch.full_like(inputs_BLNH["q"], float("nan"))
    exchange.bind(inputs_BLNH, out_BLNH)
    for op in schedule.ops:
        if op.kind == "exchange":
            exchange.send(op.chunk, op.tensors, place.gloo, False)
            exchange.receive(op.chunk, op.tensors)
    count = B * L * P * M * P * H
    right = {}
    for chunk, (start, m) in enumerate(zip(schedule.chunk_starts, schedule.cut, strict=True)):
        qkv_BSmH = exchange.chunk_qkv(chunk)
        first = place.rank * M + start
        for t, x_BSmH in enumerate(qkv_BSmH):
            whole_BSNH = torch.arange(t * count, (t + 1) * count, dtype=torch.float32).view(B, L * P, M * P, H)
            right[f"chunk {chunk} tensor {t}"] = torch.equal(x_BSmH, whole_BSNH[:, :, first : first + m])
        o_BSmH = qkv_BSmH[0].clone()
        exchange.send_back(chunk, o_BSmH, place.gloo, False)
        exchange.receive_back(chunk)
    right["back"] = torch.equal(out_BLNH, inputs_BLNH["q"])
    return right


@pytest.mark.parametrize("heads_first", [False, True], ids=["as it lies", "heads first"])
@pytest.mark.parametrize(
    "schedule",
    [serial((M,)), serial((M,), split_qkv=True), serial((1, 3, 1)), serial((1,) * M)],
    ids=["packed", "split", "1-3-1", "one head"],
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_element_finds_its_place(ranks: int, schedule: Schedule, heads_first: bool) -> None:
    for right in on_ranks(ranks, there_and_back, schedule, heads_first):
        assert len(right) == 3 * len(schedule.cut) + 1
        assert [what for what, equal in right.items() if not equal] == []


def buffer_bytes(place: Place) -> dict[tuple[str, bool], int]:
    found = {}
    for heads_first in (False, True):
        for cut in ((M,), (1, 3, 1), (1,) * M):
            shape = LayerShape(B, L, M * place.ranks, H)
            exchange = HeadExchange(
                serial(cut), place.ranks, shape, torch.bfloat16, place.device, heads_first=heads_first
            )
            found["-".join(map(str, cut)), heads_first] = exchange.nbytes
    return found


def test_chunks_need_no_more_memory_than_ulysses() -> None:
    (found,) = on_ranks(1, buffer_bytes)
    qkv = 3 * B * L * M * H * 2
    assert {nbytes / qkv for nbytes in found.values()} == {2}


CASES = [
    *((method, "5") for method in ("ulysses", "ulysses-packed", "ceiling", "ring")),
    *((m, plan) for m in ("hcms-serial", "hcms", "hcms-3lane") for plan in ("5", "even:2", "1-3-1", "1-1-1-1-1")),
]


def collectives(place: Place, method: str, plan: str, dtype: torch.dtype) -> list[list[tuple[str, int]]]:
    """The c10d operations of a first and of a warm call, as (name, bytes)."""
    inputs = [own(place, x) for x in whole_qkv((B, L * place.ranks, M * place.ranks, H), dtype)]
    attention = SequenceParallelAttention(place.gloo, method, plan)
    attention.layer(*inputs)  # ranks agree on a shape once, before its first call
    calls = []
    for _ in range(2):
        with Collectives() as seen:
            attention(*inputs)
        calls.append(seen.calls)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("method", "plan"), CASES)
def test_number_and_size_of_collectives(method: str, plan: str, ranks: int, dtype: torch.dtype) -> None:
    tensor = B * L * M * ranks * H * dtype.itemsize  # one of this rank's q, k, v, out
    head = tensor // M  # one head of every rank
    cut = {"5": (5,), "even:2": (2, 3), "1-3-1": (1, 3, 1), "1-1-1-1-1": (1,) * 5}[plan]
    if method == "ulysses":
        expected = Counter({("alltoall_base", tensor): 4})
    elif method == "ring":
        expected = Counter({(name, 2 * tensor): ranks - 1 for name in ("send", "recv") if ranks > 1})
    else:
        expected = Counter(("alltoall_base", tensors * m * head) for m in cut for tensors in (3, 1))
        assert expected.total() == 2 * len(cut)
    for first, warm in on_ranks(ranks, collectives, method, plan, dtype):
        assert Counter(first) == expected
        assert warm == first


def test_order_of_collectives_is_the_same_on_every_rank() -> None:
    for method, plan in CASES:
        ordered = [calls[0] for calls in on_ranks(4, collectives, method, plan, torch.float32)]
        assert ordered == [ordered[0]] * 4


def still(kernel: Kernel) -> Kernel:
    """A kernel that allocates nothing: it hands out what it made before, by shape."""
    made: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def attend_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if q.shape not in made:
            o_BmSH = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype)
            made[q.shape] = o_BmSH.transpose(1, 2), torch.zeros(o_BmSH.shape[:3])
        return made[q.shape]

    return replace(kernel, attend=lambda q, k, v: attend_lse(q, k, v)[0], attend_lse=attend_lse)


def warm_allocations(place: Place, method: str, plan: str, batch: int, own_kernel: bool) -> dict[str, list[int]]:
    """What a third call allocates, what its attention alone would, and the size of `out`, each in bytes."""
    inputs = [own(place, x) for x in whole_qkv((batch, L * place.ranks, M * place.ranks, H), torch.float32)]
    attention = SequenceParallelAttention(place.gloo, method, plan)
    if not own_kernel:
        attention.kernel = still(attention.kernel)
    with torch.inference_mode():
        for _ in range(2):
            attention(*inputs)
        whole_call = [n for n in allocations(lambda: attention(*inputs)) if n > 0]
        schedule = attention.schedule
        assert schedule is not None
        kernel_alone = []
        if own_kernel and method != "ring":
            exchange = attention.layer(*inputs).program._exchange  # pyright: ignore[reportAttributeAccessIssue]
            for chunk in range(len(schedule.cut)):
                kernel_alone += [
                    n for n in allocations(lambda c=chunk: attention.kernel.attend(*exchange.chunk_qkv(c))) if n > 0
                ]
    return {"call": sorted(whole_call), "kernel": sorted(kernel_alone), "out": [inputs[0].nbytes]}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("method", "plan"), [("ulysses", "5"), ("ulysses-packed", "5"), ("hcms-serial", "1-3-1"), ("hcms", "1-3-1")]
)
def test_a_warm_call_allocates_the_output_and_what_the_kernel_needs(method: str, plan: str, batch: int) -> None:
    for seen in on_ranks(2, warm_allocations, method, plan, batch, True):
        assert len(seen["kernel"]) > 0
        assert seen["call"] == sorted(seen["kernel"] + seen["out"])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "ring"])
def test_a_warm_exchange_allocates_nothing(method: str, batch: int) -> None:
    for seen in on_ranks(2, warm_allocations, method, "1-3-1", batch, False):
        assert seen["call"] == seen["out"]


def test_a_warm_ring_allocates_only_for_merging() -> None:
    for seen in on_ranks(2, warm_allocations, "ring", "5", 2, False):
        assert seen["out"][0] in seen["call"]
        seen["call"].remove(seen["out"][0])
        assert max(seen["call"]) <= B * M * 2 * L * 4  # a float32 log-sum-exp; K and V are H times that


def test_allocations_are_counted() -> None:
    x = torch.ones(500)
    cpu = torch.device("cpu")
    assert allocations(lambda: torch.empty(1000)) == [4000]
    assert allocations(lambda: x.clone().neg()) == [2000, 2000, -2000]
    assert peak_bytes(lambda: [x.clone() for _ in range(3)], cpu) == 6000
    assert peak_bytes(lambda: [x.clone().sum().item() for _ in range(3)], cpu) < 4000


@pytest.mark.parametrize("begin", [0, 1])  # head vectors that begin at a multiple of 16 bytes, and between two
@pytest.mark.parametrize("width", [1, 8, 15, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_copies_copy_bits(dtype: torch.dtype, width: int, begin: int) -> None:
    words = 16 * dtype.itemsize // 2
    every_kind_of_bits = torch.randint(-(2**15), 2**15, (3, 4, 2 * words), dtype=torch.int16)
    source = every_kind_of_bits.view(dtype)[..., begin : begin + width].permute(1, 0, 2)
    target = torch.zeros(source.shape, dtype=dtype)
    if (wide := widened(source)) is not source:
        widened(target).copy_(wide)
        assert width * dtype.itemsize % 16 == 0
    else:
        target.copy_(source)
    assert torch.equal(target.view(torch.int16), source.contiguous().view(torch.int16))
