"""CUDA lanes on one GPU, one rank over NCCL to itself. Skipped with a reason where there is no GPU.

Runs by itself: `PYTHONPATH=src pytest tests/test_cuda.py`. HCMS_RACE_ROUNDS sets the rounds of the race test.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
import torch.distributed as dist

from hcms.attention import SequenceParallelAttention
from hcms.kernels import KERNELS, attend_full

pytestmark = [
    pytest.mark.t2,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; none is visible here"),
]

N, L, H = 10, 512, 128
ROUNDS = int(os.environ.get("HCMS_RACE_ROUNDS", "50"))
CASES = [
    ("ulysses-packed", "10"),
    ("hcms-serial", "3-4-3"),
    ("hcms", "10"),
    ("hcms", "even:5"),
    ("hcms", "1-2-4-2-1"),
    ("hcms", "even:10"),
    ("hcms-3lane", "even:5"),
]


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29561")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


def qkv(seed: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (batch, L, N, H)
    return [torch.randn(size, generator=generator, device="cuda").to(dtype) for _ in range(3)]


@pytest.mark.parametrize(("method", "plan"), CASES)
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_lanes_equal_serial_bitwise(method: str, plan: str, batch: int) -> None:
    serial, tested = SequenceParallelAttention(None, "ulysses", "10"), SequenceParallelAttention(None, method, plan)
    for seed in range(4):
        inputs = qkv(seed, batch)
        expected = serial(*inputs)
        tested.poison()
        assert torch.equal(tested(*inputs), expected)
    q, k, v = inputs
    error = (expected.double() - attend_full(q, k, v)).abs().max()
    plain = (KERNELS["sdpa"].attend(q, k, v).double() - attend_full(q, k, v)).abs().max()
    assert error <= 2 * plain + 1e-6


class Spinning:
    """A program whose operations begin and end with a random spin on whatever stream they run on."""

    def __init__(self, program, chance: random.Random) -> None:
        self._program, self._chance = program, chance

    def _spin(self) -> None:
        if self._chance.random() < 0.5:
            torch.cuda._sleep(self._chance.randrange(1, 400_000))

    def start(self, op, group, async_op):
        self._spin()
        return self._program.start(op, group, async_op)

    def finish(self, op) -> None:
        self._program.finish(op)
        self._spin()


@pytest.mark.parametrize(("method", "plan"), [("hcms", "1-2-4-2-1"), ("hcms-3lane", "even:5")])
@torch.inference_mode()
def test_race_random_spins_and_poisoned_buffers(method: str, plan: str) -> None:
    serial, tested = SequenceParallelAttention(None, "ulysses", "10"), SequenceParallelAttention(None, method, plan)
    sets = [qkv(seed) for seed in range(8)]
    expected = [serial(*inputs) for inputs in sets]
    layer = tested.layer(*sets[0])
    schedule, program = layer.schedule, layer.program
    lanes, chance = tested._lanes, random.Random(0)
    assert lanes is not None
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for round_ in range(ROUNDS):
        which = round_ % len(sets)
        # Poison while the call before may still run: nothing but the edges keeps them apart.
        program.poison()
        inputs = [x.clone() for x in sets[which]]
        out = torch.full_like(inputs[0], float("nan"))
        program.bind(inputs[0], inputs[1], inputs[2], out)
        lanes.run(schedule, Spinning(program, chance))
        program.release()
        for x in inputs:  # what the caller may do as soon as the call returns
            x.fill_(float("nan"))
        wrong += (out != expected[which]).any()
    assert wrong.item() == 0


@pytest.mark.parametrize("name", [n for n in KERNELS if n not in ("math",)])
@torch.inference_mode()
def test_kernels_against_float64(name: str) -> None:
    kernel = KERNELS[name]
    if refusal := kernel.refusal(torch.bfloat16, H, "cuda"):
        pytest.skip(refusal)
    q, k, v = qkv(0)
    wanted = attend_full(q, k, v)
    bound = 8 * torch.finfo(torch.bfloat16).eps * wanted.abs().max().item()
    assert (kernel.attend(q, k, v).double() - wanted).abs().max().item() <= bound
    if kernel.attend_lse is not None:
        out, lse_BNL = kernel.attend_lse(q, k, v)
        scores = torch.einsum("blnh,bsnh->bnls", q.double(), k.double()) / H**0.5
        assert (out.double() - wanted).abs().max().item() <= bound
        assert (lse_BNL.double() - scores.logsumexp(-1)).abs().max().item() < 1e-2


@torch.inference_mode()
def test_a_warm_call_never_synchronises_the_host() -> None:
    tested, inputs = SequenceParallelAttention(None, "hcms", "even:5"), qkv(0)
    for _ in range(3):
        tested(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tested(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_a_warm_call_allocates_the_output_and_the_kernels_results_only() -> None:
    tested, inputs = SequenceParallelAttention(None, "hcms", "even:5"), qkv(0)
    for _ in range(3):
        tested(*inputs)
    schedule = tested.layer(*inputs).schedule
    torch.cuda.synchronize()

    def allocations(call) -> int:
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before

    q = inputs[0]
    kernel_alone = allocations(lambda: tested.kernel.attend(*(x[:, :, :2] for x in inputs)))
    assert allocations(lambda: tested(*inputs)) <= 1 + len(schedule.cut) * kernel_alone
    assert allocations(lambda: torch.empty_like(q)) == 1


@pytest.mark.parametrize(("method", "plan"), [("ulysses", "10"), ("hcms", "even:5"), ("hcms-3lane", "1-4-4-1")])
@torch.inference_mode()
def test_a_graph_replays_what_a_call_gives(method: str, plan: str) -> None:
    tested, inputs = SequenceParallelAttention(None, method, plan), qkv(0)
    for _ in range(3):
        tested(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = tested(*inputs)
    for seed in (1, 2):
        for x, fresh in zip(inputs, qkv(seed), strict=True):
            x.copy_(fresh)
        tested.poison()
        graph.replay()
        assert torch.equal(out, SequenceParallelAttention(None, "ulysses", "10")(*inputs))


@torch.inference_mode()
def test_lanes_overlap_and_serial_does_not() -> None:
    """At a size where attention takes milliseconds, an exchange ends before the attention before it does."""
    inputs = [torch.randn(1, 16_384, N, H, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    for method, overlaps in (("hcms", True), ("hcms-serial", False)):
        tested = SequenceParallelAttention(None, method, "even:5", record_timeline=True)
        for _ in range(3):
            tested(*inputs)
        assert tested.timeline is not None
        exchanges = [s for s in tested.timeline.spans if s.op.kind == "exchange"]
        attends = [s for s in tested.timeline.spans if s.op.kind == "attend"]
        assert (exchanges[1].begin_ms < attends[0].end_ms) == overlaps
