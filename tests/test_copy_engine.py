"""The copy-engine transport between real processes, all on one card: bitwise, raced, and every edge is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.programs.ulysses import UlyssesProgram
from hcms.schedule.schedule import Op
from hcms.transport.copy_engine import _FREE, CopyEngineExchange, _Peers

pytestmark = [
    pytest.mark.t2,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
    pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-bindings is not installed"),
]

ROUNDS = int(os.environ.get("HCMS_RACE_ROUNDS", "50"))
LOCAL_TOKENS, HEADS, HEAD_DIM = 96, 16, 64
PLANS = (
    ("ulysses", "even:1"),
    ("ulysses-packed", "even:1"),
    ("hcms", "even:2"),
    ("hcms-3lane", "1-2-1"),
    ("hcms-zero", "1x2-1-1-1x2+fill"),
)
THIN = ("hcms-zero", "1x2-1-1-1x2+fill")
MICROSECOND = 1_500  # cycles, about
LATE_US = 10_000


def of(plan: tuple[str, str], ranks: int) -> tuple[str, str]:
    """A plan that fits: 16 heads are four a rank on four ranks, and eight on two."""
    method, cut = plan
    if ranks == 2:
        cut = {"1-2-1": "2-4-2", THIN[1]: "1x2-3-3-1x2+fill"}.get(cut, cut)
    return method, cut


def whole(seed: int, ranks: int, batch: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (batch, ranks * LOCAL_TOKENS, HEADS, HEAD_DIM)
    return [torch.randn(size, generator=generator, device="cuda").bfloat16() for _ in range(3)]


def expected(qkv: list[Tensor], kernel: Any, rank: int) -> Tensor:
    """This rank's tokens of attention to everything, head by head, as no exchange is needed for it."""
    heads = [kernel.attend(*(x[:, :, h : h + 1] for x in qkv)) for h in range(HEADS)]
    return torch.cat(heads, 2)[:, rank * LOCAL_TOKENS : (rank + 1) * LOCAL_TOKENS]


def wrong_rounds(
    attend: SequenceParallelAttention,
    rank: int,
    ranks: int,
    rounds: int,
    batch: int,
    seed: int = 0,
    enter: Callable[[], None] = lambda: None,
) -> int:
    """Rounds with other inputs each, in poisoned buffers, whose output is not bit for bit what it should be."""
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(rounds):
        qkv = whole(seed + turn, ranks, batch)
        right = expected(qkv, attend.kernel, rank)
        shard = [x[:, rank * LOCAL_TOKENS : (rank + 1) * LOCAL_TOKENS] for x in qkv]
        enter()
        attend.poison()
        wrong += ~torch.eq(attend(*shard), right).all()
    return int(wrong.item())


def on_rank(rank: int, ranks: int, store: str, task: str, answers: str) -> None:
    torch.cuda.set_device(rank % torch.cuda.device_count())  # a card each where there are enough
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    with torch.inference_mode():
        answer = TASKS[task](rank, ranks)
    Path(answers, str(rank)).write_text(json.dumps(answer))
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


def run(task: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each rank of a task answers."""
    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    torch.multiprocessing.spawn(on_rank, (ranks, str(tmp_path / "store"), task, str(tmp_path)), nprocs=ranks)
    return [json.loads((tmp_path / str(rank)).read_text()) for rank in range(ranks)]


def made(plan: tuple[str, str], ranks: int, **options: Any) -> SequenceParallelAttention:
    return SequenceParallelAttention(None, *of(plan, ranks), transport="copy-engine", **options)


def every_plan(rank: int, ranks: int) -> dict[str, int]:
    return {
        f"{plan} batch {batch}": wrong_rounds(made(plan, ranks), rank, ranks, 3, batch)
        for plan in PLANS
        for batch in (1, 2)
    }


def delayed(seed: int) -> None:
    """From now on, random spins before every operation on its own stream."""
    start, draw = UlyssesProgram.start, random.Random(seed)

    def late(self: UlyssesProgram, *args: Any) -> Any:
        if draw.random() < 0.5:
            torch.cuda._sleep(draw.randrange(400) * MICROSECOND)
        return start(self, *args)

    setattr(UlyssesProgram, "start", late)  # noqa: B010 - this process does nothing else


def raced(rank: int, ranks: int) -> dict[str, int]:
    delayed(rank)
    each = -(-ROUNDS // len(PLANS))
    return {str(plan): wrong_rounds(made(plan, ranks), rank, ranks, each, 1, seed=1000) for plan in PLANS}


def graphs(rank: int, ranks: int) -> dict[str, Any]:
    """Replays on every rank, and on every other one, beside eager calls."""
    found: dict[str, Any] = {}
    for name, mine in (("all", "auto"), ("some", "auto" if rank % 2 else "off")):
        attend = made(THIN, ranks, graph=mine)
        given = [x[:, :LOCAL_TOKENS].contiguous() for x in whole(0, ranks, 1)]
        wrong = 0
        for turn in range(6):
            qkv = whole(turn, ranks, 1)
            for target, x in zip(given, qkv, strict=True):
                target.copy_(x[:, rank * LOCAL_TOKENS : (rank + 1) * LOCAL_TOKENS])
            attend.poison()
            out = attend(*given)
            wrong += not torch.equal(out, expected(qkv, attend.kernel, rank))
            del out  # its address comes again
        found[name] = (wrong, attend.path, mine)
    return found


def without_an_edge(rank: int, ranks: int) -> dict[str, bool]:
    """For each edge, whether any rank had a wrong result without it; under '' whether one had with all of them.

    One rank in turn is late with what the edge tells of: with entering the call, or with the one operation.
    """
    start, take = UlyssesProgram.start, _Peers.take_words
    dropped: list[Any] = [None]
    slow = [0]

    def late(self: UlyssesProgram, op: Op, *args: Any) -> Any:
        tensors = {"exchange": op.tensors, "return": "o"}.get(op.kind)
        if rank == slow[0] and dropped[0] == (op.chunk, tensors, op.part[0]):
            torch.cuda._sleep(LATE_US * MICROSECOND)
        return start(self, op, *args)

    def taken(self: _Peers, edge: tuple[Any, ...]) -> None:
        if edge != dropped[0]:
            take(self, edge)

    def enter() -> None:
        if rank == slow[0] and dropped[0] == _FREE:
            torch.cuda._sleep(LATE_US * MICROSECOND)

    setattr(UlyssesProgram, "start", late)  # noqa: B010 - this process does nothing else
    _Peers.take_words = taken
    attend = made(THIN, ranks)
    wrong_rounds(attend, rank, ranks, 1, 1)
    exchange = next(iter(attend._layers.values())).program._exchange  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(exchange, CopyEngineExchange)
    found: dict[str, bool] = {}
    for edge in [None, *exchange._peers._edges]:
        dropped[0] = edge
        wrong = 0
        for slow[0] in range(ranks):
            wrong += wrong_rounds(attend, rank, ranks, 3, 1, seed=50, enter=enter)
        everyones: list[Any] = [None] * ranks
        dist.all_gather_object(everyones, wrong)
        found["" if edge is None else str(edge)] = sum(everyones) > 0
        exchange._peers._words.zero_()  # nobody took down what was raised without this edge
        torch.cuda.synchronize()
        dist.barrier()
    return found


TASKS = {f.__name__: f for f in (every_plan, raced, graphs, without_an_edge)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_plan_is_bitwise_right(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [set(answer.values()) for answer in run("every_plan", ranks, tmp_path, monkeypatch)] == [{0}] * ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_races_with_random_spins(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [set(answer.values()) for answer in run("raced", ranks, tmp_path, monkeypatch)] == [{0}] * ranks


def test_graphs_replay_beside_graphs_and_eager_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in run("graphs", 2, tmp_path, monkeypatch):
        for wrong, path, asked in answer.values():
            assert wrong == 0
            assert path == ("graph" if asked == "auto" else "eager")


def test_every_edge_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = run("without_an_edge", 2, tmp_path, monkeypatch)[0]
    assert not answer.pop("")  # with all of them, nothing is wrong
    assert [edge for edge, wrong in answer.items() if not wrong] == []


def test_a_ring_cannot_go_by_it() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(ValueError, match="sends and receives"):
        SequenceParallelAttention(None, "ring", transport="copy-engine")
    dist.destroy_process_group()
