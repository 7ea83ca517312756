"""CUDA lanes beyond tests/test_cuda.py: every schedule, missing edges, a warm call's cost, every method's graph.

Needs torch with CUDA and pytest, nothing else: `PYTHONPATH=src pytest tests/test_cuda_lanes.py`. HCMS_RACE_ROUNDS says
how many random calls the race test makes (50).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.kernels import KERNELS, attend_full, kernel
from hcms.lanes import Program
from hcms.lanes.communicators import communicator
from hcms.lanes.cuda import CudaLanes
from hcms.methods import METHODS
from hcms.programs.ulysses import UlyssesProgram
from hcms.schedule.schedule import COMM, COMM_OUT, Op, Schedule, serial, three_lane, two_lane
from hcms.schedule.timeline import Timeline
from hcms.transport.layout import HeadExchange, LayerShape

pytestmark = [
    pytest.mark.t2,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
    pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL"),
]

ROUNDS = int(os.environ.get("HCMS_RACE_ROUNDS", "50"))
L, N, H = 384, 6, 64
CUTS = ((6,), (3, 3), (1, 4, 1), (1,) * 6)
MILLISECOND = 1_500_000  # cycles, about


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    """One rank over NCCL, as the default group."""
    store: Path = tmp_path_factory.mktemp("nccl") / "store"
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=device)
    made = dist.group.WORLD
    assert made is not None
    yield made
    torch.cuda.synchronize()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def lanes(group: dist.ProcessGroup) -> CudaLanes:
    """Lanes for schedules of up to three lanes, each with a communicator of its own."""
    groups = {lane: communicator(group, lane) for lane in (COMM, COMM_OUT)}
    return CudaLanes(torch.device("cuda", 0), group, groups)


def made_inputs(seed: int, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(batch, L, N, H, generator=generator, device="cuda").to(dtype) for _ in range(3)]


def made_program(schedule: Schedule, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> UlyssesProgram:
    shape = LayerShape(batch, L, N, H)
    exchange = HeadExchange(schedule, 1, shape, dtype, torch.device("cuda", 0), heads_first=False)
    return UlyssesProgram(exchange, kernel("sdpa"))


class Spinning:
    """A program whose operations begin and finish late: a spin of the GPU on the operation's own stream goes first."""

    def __init__(self, program: Program, cycles: Callable[[Op], int]) -> None:
        self._program, self._cycles = program, cycles

    def _spin(self, op: Op) -> None:
        if cycles := self._cycles(op):
            torch.cuda._sleep(cycles)

    def start(self, op: Op, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        self._spin(op)
        return self._program.start(op, group, async_op)

    def finish(self, op: Op) -> None:
        self._spin(op)
        self._program.finish(op)


def call(
    lanes: CudaLanes,
    schedule: Schedule,
    program: UlyssesProgram,
    inputs: list[Tensor],
    cycles: Callable[[Op], int] = lambda op: 0,
    record: bool = False,
) -> tuple[Tensor, Timeline | None]:
    """A call as the front door makes it, with spins; nothing here waits for the GPU unless it records."""
    q_BLNH, k_BLNH, v_BLNH = inputs
    out_BLNH = torch.full_like(q_BLNH, float("nan"))
    program.bind(q_BLNH, k_BLNH, v_BLNH, out_BLNH)
    try:
        timeline = lanes.run(schedule, Spinning(program, cycles), record=record)
    finally:
        program.release()
    return out_BLNH, timeline


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_lanes_equal_serial_bitwise(lanes: CudaLanes, cut: tuple[int, ...], dtype: torch.dtype, batch: int) -> None:
    """The same kernel calls in the same sizes, so the same bits; what cuts change is the kernel's own affair."""
    schedules = [
        build(cut, prefetch=depth, first=first)
        for build in (two_lane, three_lane)
        for depth in (None, 1)
        for first in ("exchange", "return")
    ]
    serial_program = made_program(serial(cut), dtype, batch)
    programs = [made_program(schedule, dtype, batch) for schedule in schedules]
    for seed in range(3):
        inputs = made_inputs(seed, dtype, batch)
        serial_program.poison()
        expected, _ = call(lanes, serial(cut), serial_program, inputs)
        for schedule, program in zip(schedules, programs, strict=True):
            program.poison()
            out, _ = call(lanes, schedule, program, inputs)
            assert torch.equal(out, expected), (schedule.name, seed)


@pytest.mark.parametrize("method", METHODS)
def test_methods_against_full_attention(group: dist.ProcessGroup, method: str) -> None:
    attention = SequenceParallelAttention(group, method, "1-4-1")
    for seed in range(3):
        inputs = made_inputs(seed)
        exact = attend_full(*inputs)
        plain = (kernel("sdpa").attend(*inputs).double() - exact).abs().max().item()
        attention.poison()
        error = (attention(*inputs).double() - exact).abs().max().item()
        assert error <= 2 * plain + torch.finfo(torch.bfloat16).eps * exact.abs().max().item()


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # outputs are below 1


@pytest.mark.parametrize("layout", ["contiguous", "as an exchange leaves it"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "math"])
def test_kernels_against_float64(name: str, dtype: torch.dtype, layout: str) -> None:
    if refusal := KERNELS[name].refusal(dtype, 128, "cuda"):
        pytest.skip(refusal)
    generator = torch.Generator("cuda").manual_seed(5)
    arrived_SB3mH = torch.randn(512, 2, 3, 4, 128, generator=generator, device="cuda").to(dtype)
    inputs = [arrived_SB3mH[:, :, t].transpose(0, 1) for t in range(3)]
    if layout == "contiguous":
        inputs = [x.contiguous() for x in inputs]
    exact = attend_full(*inputs)
    q, k = (x.transpose(1, 2).double() for x in inputs[:2])
    exact_lse = torch.logsumexp(q @ k.transpose(-1, -2) / 128**0.5, dim=-1)
    attend_lse = KERNELS[name].attend_lse
    assert attend_lse is not None
    out = KERNELS[name].attend(*inputs)
    also_out, lse = attend_lse(*inputs)
    for found in (out, also_out):
        assert found.shape == exact.shape
        assert found.dtype == dtype
        assert (found.double() - exact).abs().max().item() <= TOLERANCE[dtype]
    assert lse.shape == exact_lse.shape
    assert lse.dtype == torch.float32
    assert (lse.double() - exact_lse).abs().max().item() <= 5 * TOLERANCE[dtype]


# --- order -----------------------------------------------------------------------------------------------------------


def test_no_races(lanes: CudaLanes) -> None:
    """Random calls, each operation begun and finished late at random, on poisoned buffers and inputs just made.

    Calls follow one another without a pause, and the inputs are the caller's again as soon as a call has returned.
    """
    rng = random.Random(7)
    schedules = [
        build(cut, prefetch=depth, first=first)
        for cut in CUTS
        for build in (two_lane, three_lane)
        for depth in (None, 1)
        for first in ("exchange", "return")
    ]
    programs: dict[Schedule, UlyssesProgram] = {}
    expected: dict[tuple[tuple[int, ...], int], Tensor] = {}
    for cut in CUTS:
        program = made_program(serial(cut))
        for seed in range(4):
            expected[cut, seed], _ = call(lanes, serial(cut), program, made_inputs(seed))
    torch.cuda.synchronize()
    found: list[tuple[Schedule, int, Tensor]] = []

    def late(op: Op) -> int:
        return rng.choice([0, 0, MILLISECOND // 10, MILLISECOND // 2, MILLISECOND])

    for _ in range(ROUNDS):
        schedule, seed = rng.choice(schedules), rng.randrange(4)
        if schedule not in programs:
            programs[schedule] = made_program(schedule)
        programs[schedule].poison()
        torch.cuda._sleep(rng.choice([0, MILLISECOND]) + 1)  # inputs are pending when the call is made
        inputs = made_inputs(seed)
        out, _ = call(lanes, schedule, programs[schedule], inputs, late)
        for x in inputs:
            x.fill_(float("nan"))
        found.append((schedule, seed, out))
    torch.cuda.synchronize()
    wrong = [(s.name, s.cut, seed) for s, seed, out in found if not torch.equal(out, expected[s.cut, seed])]
    assert wrong == []


@pytest.mark.parametrize("kind", ["attend", "return"])
def test_a_missing_edge_shows(lanes: CudaLanes, kind: str) -> None:
    """What the race test rests on: without its edge, an operation runs before its input is there, and spins show it."""
    whole = two_lane((2, 2, 2))
    cut_off = tuple(replace(op, after=()) if op.kind == kind else op for op in whole.ops)
    broken = Schedule(whole.name, whole.cut, cut_off)
    late_kind = {"attend": "exchange", "return": "attend"}[kind]
    equal = []
    for seed, schedule in enumerate((whole, broken)):  # other inputs, so that what lies in freed memory is wrong
        inputs, program = made_inputs(seed), made_program(schedule)
        program.poison()
        out, _ = call(lanes, schedule, program, inputs, lambda op: 20 * MILLISECOND if op.kind == late_kind else 0)
        torch.cuda.synchronize()
        expected, _ = call(lanes, serial(whole.cut), made_program(serial(whole.cut)), inputs)
        equal.append(torch.equal(out, expected))
    assert equal == [True, False]


def test_communication_runs_beside_attention(lanes: CudaLanes) -> None:
    """Every operation takes some 10 ms more: in series they add up, on two lanes they do not."""
    took_ms = {}
    for schedule in (serial((2, 2, 2)), two_lane((2, 2, 2)), three_lane((2, 2, 2))):
        program, inputs = made_program(schedule), made_inputs(0)
        call(lanes, schedule, program, inputs)
        _, timeline = call(lanes, schedule, program, inputs, lambda op: 5 * MILLISECOND, record=True)
        assert timeline is not None
        took_ms[len(schedule.lanes)] = timeline.duration_ms
        for span in timeline.spans:
            assert span.begin_ms <= span.end_ms <= timeline.duration_ms + 0.01
            for earlier in span.op.after:
                assert timeline.spans[earlier].end_ms <= span.begin_ms + 0.01
    assert took_ms[2] < 0.9 * took_ms[1]
    assert took_ms[3] < 0.9 * took_ms[1]


# --- what a warm call costs the host and the allocator ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["ulysses", "ulysses-packed", "hcms-serial", "hcms", "hcms-3lane", "ring"])
def warm(request: pytest.FixtureRequest, group: dist.ProcessGroup) -> SequenceParallelAttention:
    attention = SequenceParallelAttention(group, request.param, "1-4-1")
    for seed in range(3):
        attention(*made_inputs(seed))
    torch.cuda.synchronize()
    return attention


def test_no_host_synchronisation(warm: SequenceParallelAttention) -> None:
    inputs = made_inputs(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200 * MILLISECOND)
        out = warm(*inputs)
        done = torch.cuda.Event()
        done.record()
        came_back_first = not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert came_back_first
    assert torch.isfinite(out).all()


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """How many tensors' memory `run` took from the allocator, and how many bytes."""
    before = torch.cuda.memory_stats()
    result = run()
    after = torch.cuda.memory_stats()
    del result
    keys = ("allocation.all.allocated", "allocated_bytes.all.allocated")
    count, nbytes = (after[key] - before[key] for key in keys)
    return count, nbytes


@pytest.mark.parametrize("method", ["ulysses", "ulysses-packed", "hcms-serial", "hcms", "hcms-3lane"])
def test_a_warm_call_allocates_the_output_and_what_the_kernel_needs(group: dist.ProcessGroup, method: str) -> None:
    """Batch 1, where the kernel's result is sent as it lies."""
    attention = SequenceParallelAttention(group, method, "1-4-1")
    inputs = made_inputs(0)
    for _ in range(3):
        attention(*inputs)
    whole = allocations(lambda: attention(*inputs))
    layer = attention.layer(*inputs)
    schedule, program = layer.schedule, layer.program
    assert isinstance(program, UlyssesProgram)
    chunks = range(len(schedule.cut))
    exchange = program._exchange
    alone = [allocations(lambda c=c: attention.kernel.attend(*exchange.chunk_qkv(c))) for c in chunks]
    out = allocations(lambda: torch.empty_like(inputs[0]))
    assert whole == tuple(sum(column) for column in zip(*alone, out, strict=True))


def test_memory_does_not_grow(warm: SequenceParallelAttention) -> None:
    inputs = made_inputs(0)
    warm(*inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(20):
        warm(*inputs)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def test_a_replayed_graph_equals_eager(warm: SequenceParallelAttention) -> None:
    static = made_inputs(0)
    warm(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Thread-local: NCCL's watchdog asks about events of earlier calls from a thread of its own meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = warm(*static)
    for seed in range(1, 4):
        inputs = made_inputs(seed)
        expected = warm(*inputs)
        for x, new in zip(static, inputs, strict=True):
            x.copy_(new)
        warm.poison()
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
    expected = warm(*static)  # eager calls go on working after a capture
    assert torch.equal(out, expected)
    graph.reset()
