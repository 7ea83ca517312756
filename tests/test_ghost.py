"""The ghost link on a card: every method right in its world, what leaves checked byte by byte, graphs, races.

Needs torch with CUDA and pytest, nothing else: `PYTHONPATH=src pytest tests/test_ghost.py`. HCMS_RACE_ROUNDS says how
many random calls the race test makes (50).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ghosts import replayed
from hcms.attention import SequenceParallelAttention
from hcms.kernels import attend_full
from hcms.lanes.cuda import CudaLanes
from hcms.lanes.graph import CallGraphs
from hcms.links import ghost
from hcms.links.ghost_wire import WIRE
from hcms.methods import METHODS, build_schedule
from hcms.programs.ulysses import UlyssesProgram
from hcms.schedule.schedule import Op, Schedule

pytestmark = [
    pytest.mark.t2,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]

ROUNDS = int(os.environ.get("HCMS_RACE_ROUNDS", "50"))
RANKS, L, M, H = 4, 384, 5, 64
PLANS = [(m, "5") for m in METHODS if not METHODS[m].cuts]
PLANS += [(m, plan) for m in METHODS if METHODS[m].cuts for plan in ("5", "even:2", "1-3-1", "even:max")]
THIN = ["5x3", "1x2-3-1x2", "2x4-3+fill", "1x3-1-1-1-1x2+fill"]
PLANS += [("hcms-zero", plan) for plan in THIN]
SPIN_CYCLES = 1_500_000  # a millisecond, about


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    if dist.is_initialized():
        pytest.skip("a process group of another test file is open: run this file by itself")
    made = ghost.start(0, RANKS, torch.device("cuda", 0), timedelta(minutes=1), None)
    WIRE.reserve(64 << 20)
    yield made
    torch.cuda.synchronize()
    dist.destroy_process_group()


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (1, L, RANKS * M, H)
    return [torch.randn(size, generator=generator, device="cuda").bfloat16() for _ in "qkv"]


def exact(qkv: list[Tensor]) -> Tensor:
    """Full attention in float64 over the ghost's world, as `[B, L, N, H]`."""
    q, k, v = (x.unflatten(2, (RANKS, M)).movedim(2, 1).flatten(1, 2) for x in qkv)
    return attend_full(q, k, v).unflatten(1, (RANKS, L)).movedim(1, 2).flatten(2, 3)


@pytest.mark.parametrize(("method", "plan"), PLANS)
def test_every_method_is_right(group: dist.ProcessGroup, method: str, plan: str) -> None:
    ulysses, tested = SequenceParallelAttention(group, "ulysses"), SequenceParallelAttention(group, method, plan)
    for seed in range(3):
        qkv = inputs(seed)
        expected, _ = replayed(group, ulysses, qkv)
        out, wrong = replayed(group, tested, qkv)
        assert wrong == 0
        if method != "ring":
            assert torch.equal(out, expected), seed
        assert (out.double() - exact(qkv)).abs().max() < 4e-3


@pytest.mark.parametrize(("method", "plan"), PLANS)
def test_a_graph_gives_the_same(group: dist.ProcessGroup, method: str, plan: str) -> None:
    eager = SequenceParallelAttention(group, method, plan)
    graphed = SequenceParallelAttention(group, method, plan, graph="auto")
    sets = [inputs(seed) for seed in range(2)]
    paths = set()
    for turn in range(8):
        qkv = sets[turn % 2]
        expected, _ = replayed(group, eager, qkv)
        ghost.lay(group, RANKS * M, lambda qkv=qkv: eager(*qkv))
        graphed.layer(*qkv)
        graphed.poison()
        WIRE.spoil()
        ghost.rewind(group)
        out = graphed(*qkv)
        assert WIRE.wrong_bytes() == 0
        assert torch.equal(out, expected), turn
        paths.add(graphed.path)
        del out
    assert "graph" in paths


def test_new_addresses_every_time_end_in_one_graph_of_copies(group: dist.ProcessGroup) -> None:
    eager = SequenceParallelAttention(group, "hcms-zero", "1-3-1")
    graphed = SequenceParallelAttention(group, "hcms-zero", "1-3-1", graph="auto")
    kept = []
    for seed in range(140):
        qkv = inputs(seed)
        kept.append(qkv)  # so that no address comes again
        ghost.lay(group, RANKS * M, lambda qkv=qkv: eager(*qkv))
        expected = eager(*qkv)
        ghost.rewind(group)
        out = graphed(*qkv)
        kept.append([out])
        assert torch.equal(out, expected), seed
    assert graphed.path == "graph"


def test_bytes_that_do_not_leave_are_seen(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    tested = SequenceParallelAttention(group, "ulysses-packed")
    qkv = inputs(0)
    tested.layer(*qkv)
    torch.cuda._sleep(100_000_000)  # the pass that lays is late: what leaves in it must not pass for this call's
    ghost.lay(group, RANKS * M, lambda: tested(*qkv))
    monkeypatch.setattr(WIRE, "_out", lambda *_: None)
    WIRE.spoil()
    ghost.rewind(group)
    tested(*qkv)
    assert WIRE.wrong_bytes() > 0.9 * 4 * qkv[0].nbytes * (RANKS - 1) / RANKS


class Spinning:
    """A program whose operations begin and end late, each by its own spin on its own stream."""

    def __init__(self, program: UlyssesProgram, cycles: dict[Op, int]) -> None:
        self._program, self._cycles = program, cycles

    def start(self, op: Op, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        torch.cuda._sleep(self._cycles.get(op, 0))
        return self._program.start(op, group, async_op)

    def finish(self, op: Op) -> None:
        self._program.finish(op)
        torch.cuda._sleep(self._cycles.get(op, 0))


def spun(
    group: dist.ProcessGroup, schedule: Schedule, program: UlyssesProgram, qkv: list[Tensor], cycles: dict[Op, int]
) -> Tensor:
    lanes = CudaLanes(qkv[0].device, group, dict.fromkeys(("comm", "comm-out"), group))
    out = torch.full_like(qkv[0], float("nan"))
    program.bind(qkv[0], qkv[1], qkv[2], out)
    ghost.rewind(group)
    try:
        lanes.run(schedule, Spinning(program, cycles))  # pyright: ignore[reportArgumentType]
    finally:
        torch.cuda.synchronize()
        program.release()
    return out


@pytest.mark.parametrize("plan", ["1-3-1", *THIN])
def test_no_delay_changes_a_bit(group: dist.ProcessGroup, plan: str) -> None:
    draw = random.Random(plan)
    attention = SequenceParallelAttention(group, "hcms-zero", plan)
    for turn in range(ROUNDS):
        qkv = inputs(turn % 5)
        layer = attention.layer(*qkv)
        ghost.lay(group, RANKS * M, lambda qkv=qkv: attention(*qkv))
        ghost.rewind(group)
        expected = attention(*qkv)
        attention.poison()
        cycles = {op: draw.choice((0, 0, SPIN_CYCLES // 2, SPIN_CYCLES)) for op in layer.schedule.ops}
        assert isinstance(layer.program, UlyssesProgram)
        assert torch.equal(spun(group, layer.schedule, layer.program, qkv, cycles), expected), (turn, cycles)


def still_ordered(schedule: Schedule, earlier: int, later: int) -> bool:
    """Whether one operation ends before another begins, by named edges and the order of lanes."""
    before: list[set[int]] = []
    for index, op in enumerate(schedule.ops):
        same_lane = [i for i in range(index) if schedule.ops[i].lane == op.lane]
        direct = {*op.after, *same_lane[-1:]}
        before.append(direct.union(*(before[i] for i in direct)))
    return earlier in before[later]


@pytest.mark.parametrize("plan", ["1-3-1", "1x2-3-1x2+fill"])
def test_each_edge_is_needed(group: dist.ProcessGroup, plan: str) -> None:
    """Without it, and with what it waits for late, the result is wrong: a race is caught, whichever edge is missing."""
    schedule = build_schedule("hcms-zero", plan, M, RANKS)
    attention = SequenceParallelAttention(group, "hcms-zero", plan)
    qkv = inputs(1)
    layer = attention.layer(*qkv)
    program = layer.program
    assert isinstance(program, UlyssesProgram)
    ghost.lay(group, RANKS * M, lambda: attention(*qkv))
    ghost.rewind(group)
    expected = attention(*qkv)
    for index, op in enumerate(schedule.ops):
        for earlier in op.after:
            ops = list(schedule.ops)
            ops[index] = replace(op, after=tuple(e for e in op.after if e != earlier))
            broken = replace(schedule, ops=tuple(ops))
            if still_ordered(broken, earlier, index):
                continue  # by a lane's own order, which only runners without lanes would lack
            attention.poison()
            WIRE.spoil()
            cycles = {schedule.ops[earlier]: 20 * SPIN_CYCLES}
            try:
                out = spun(group, broken, program, qkv, cycles)
            except KeyError:  # the host itself reached for a result that nobody has issued yet
                continue
            assert not torch.equal(out, expected) or WIRE.wrong_bytes(), (op, schedule.ops[earlier])


@pytest.mark.parametrize("recorded", [False, True])
def test_an_automatic_plan_is_decided_by_graphs(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """Whether or not the first call is to leave a timeline, which a captured call cannot."""
    captured: list[object] = []
    capture = CallGraphs._captured

    def seen(self: CallGraphs, *args: object) -> object:
        captured.append(capture(self, *args))  # pyright: ignore[reportArgumentType]
        return captured[-1]

    monkeypatch.setattr(CallGraphs, "_captured", seen)
    attend = SequenceParallelAttention(group, "hcms-zero", "auto", graph="auto", record_timeline=recorded)
    ghost.lay(group, RANKS * M, lambda: attend(*inputs(0)))
    assert captured and None not in captured
    assert (attend.timeline is not None) == recorded
