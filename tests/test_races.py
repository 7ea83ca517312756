"""Delays around every operation change no bit on real ranks, and every edge that orders a schedule is needed."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from time import sleep

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.lanes.cpu import CpuLanes
from hcms.methods import METHODS, build_schedule
from hcms.programs.ulysses import UlyssesProgram
from hcms.schedule.schedule import Op, Schedule
from ranks import Place, on_ranks, own, whole_qkv

pytestmark = pytest.mark.t1

M, L, H = 5, 8, 16
PARTS = [(2, 250, seed) for seed in range(4)] + [(4, 100, 0)]  # ranks, rounds, and what they are drawn by
CHUNKED = [name for name, method in METHODS.items() if method.cuts]


class Delayed:
    """A program whose operations begin and finish late, each by a sleep of its own."""

    def __init__(self, program: UlyssesProgram, draw: random.Random) -> None:
        self._program, self._draw = program, draw

    def _wait(self) -> None:
        sleep(self._draw.choice((0.0, 0.0, 0.0002, 0.001)))

    def start(self, op: Op, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        self._wait()
        return self._program.start(op, group, async_op)

    def finish(self, op: Op) -> None:
        self._wait()
        self._program.finish(op)


def drawn(draw: random.Random, name: str) -> tuple[str, int, int]:
    """A cut, with ends in parts where the method has them, of so many heads a rank; and how many tokens a rank."""
    cut = [draw.randint(1, 3) for _ in range(draw.randint(1, 4))]
    tokens, texts = draw.randint(4, 12), list(map(str, cut))
    if METHODS[name].thins and draw.random() < 0.5:
        texts[0], texts[-1] = f"{cut[0]}x{draw.randint(2, 4)}", f"{cut[-1]}x{draw.randint(2, 4)}"
    return "-".join(texts), sum(cut), tokens


def delayed(place: Place, rounds: int, seed: int) -> list[str]:
    """Random methods, cuts, sizes, transports and inputs, delays that differ by rank, poisoned buffers: which rounds
    were not bitwise."""
    agreed, here = random.Random(7 + seed), random.Random(100 + 10 * seed + place.rank)
    wrong, refused = [], 0
    for turn in range(rounds):
        name, group = agreed.choice(CHUNKED), agreed.choice((place.gloo, place.emulated))
        cut, heads, tokens = drawn(agreed, name)
        whole = whole_qkv(
            (agreed.randint(1, 2), tokens * place.ranks, heads * place.ranks, H), torch.float32, turn + rounds * seed
        )
        q, k, v = (own(place, x) for x in whole)
        attention = SequenceParallelAttention(group, name, cut, prefetch=agreed.choice((None, 1, 2)))
        try:
            layer = attention.layer(q, k, v)
        except ValueError as refusal:  # at so few tokens a kernel may round by the number of rows
            if "not be Ulysses' bit for bit" not in str(refusal):
                raise
            refused += 1
            continue
        attention.poison()
        assert isinstance(layer.program, UlyssesProgram)
        out = torch.full_like(q, float("nan"))
        layer.program.bind(q, k, v, out)
        CpuLanes(group, {}).run(layer.schedule, Delayed(layer.program, here))
        layer.program.release()
        if not torch.equal(out, SequenceParallelAttention(group, "ulysses")(q, k, v)):
            wrong.append(f"round {turn}: {name} {cut}")
    assert refused < rounds / 4
    return wrong


@pytest.mark.parametrize(("ranks", "rounds", "seed"), PARTS)
def test_no_delay_changes_a_bit(ranks: int, rounds: int, seed: int) -> None:
    assert on_ranks(ranks, delayed, rounds, seed) == [[]] * ranks


class Late:
    """A program whose communication leaves this rank late, so that a peer that does not wait reads too early."""

    def __init__(self, program: UlyssesProgram, late_s: float) -> None:
        self._program, self._late_s = program, late_s

    def start(self, op: Op, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        if op.kind in ("exchange", "return"):
            sleep(self._late_s)
        return self._program.start(op, group, async_op)

    def finish(self, op: Op) -> None:
        self._program.finish(op)


def without(schedule: Schedule, index: int, earlier: int) -> Schedule:
    ops = list(schedule.ops)
    ops[index] = replace(ops[index], after=tuple(e for e in ops[index].after if e != earlier))
    return replace(schedule, ops=tuple(ops))


def computed(place: Place, schedule: Schedule, attention: SequenceParallelAttention, qkv: list[Tensor]) -> Tensor:
    """What a schedule gives; NaN where it fails. Every rank makes the same collectives, whichever edge it lacks."""
    layer = attention.layer(*qkv)
    attention.poison()
    out = torch.full_like(qkv[0], float("nan"))
    assert isinstance(layer.program, UlyssesProgram)
    layer.program.bind(qkv[0], qkv[1], qkv[2], out)
    with suppress(KeyError):  # the host reached for a result that nobody has computed
        CpuLanes(place.gloo, {}).run(schedule, Late(layer.program, 0.03 * place.rank))
    layer.program.release()
    return out


def needless(place: Place, name: str, cut: str) -> list[str]:
    """Edges into attention and out of returns without which the result is still right.

    On a CPU these are what the host waits for. What orders the link behind computation on its own thread is order of
    issue, which no missing edge undoes; on a GPU every edge is tried (tests/test_ghost.py).
    """
    schedule = build_schedule(name, cut, M, place.ranks, on_host=True)
    attention = SequenceParallelAttention(place.gloo, name, cut)
    qkv = [own(place, x) for x in whole_qkv((1, L * place.ranks, M * place.ranks, H), torch.float32)]
    expected = attention(*qkv)
    spare = []
    for index, op in enumerate(schedule.ops):
        for earlier in op.after:
            if schedule.ops[earlier].kind not in ("exchange", "return") or op.kind not in ("attend", "unpack"):
                continue
            if torch.equal(computed(place, without(schedule, index, earlier), attention, qkv), expected):
                spare.append(f"{op} after {schedule.ops[earlier]}")
    return spare


@pytest.mark.parametrize("cut", ["1-3-1", "even:max"])
@pytest.mark.parametrize("name", ["hcms", "hcms-3lane", "hcms-zero"])
def test_each_edge_that_the_host_waits_for_is_needed(name: str, cut: str) -> None:
    first, second = on_ranks(2, needless, name, cut)
    assert set(first) & set(second) == set()
