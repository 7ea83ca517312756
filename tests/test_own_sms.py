"""SMs of their own for communication, on a card: every bit right, exchanges by kernel no longer held up, races.

Needs torch with CUDA, Triton, cuda-bindings and pytest: `PYTHONPATH=src pytest tests/test_own_sms.py`, by itself.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ghosts import replayed
from hcms.attention import SequenceParallelAttention
from hcms.lanes.own_sms import own_sms
from hcms.links import ghost, ghost_sm
from hcms.links.ghost_wire import WIRE
from hcms.schedule.schedule import COMM, COMPUTE, COMPUTE_2

pytestmark = [
    pytest.mark.t2,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]

ROUNDS = int(os.environ.get("HCMS_RACE_ROUNDS", "50"))
RANKS, M, H = 4, 5, 128
CUDA = torch.device("cuda", 0)
PLANS = ["5+sms8", "1-3-1+sms8", "1x2-3-1x2+fill+sms8", "even:max+sms16"]


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    if dist.is_initialized():
        pytest.skip("a process group of another test file is open: run this file by itself")
    pytest.importorskip("cuda.bindings")
    made = ghost_sm.start(0, RANKS, CUDA, timedelta(minutes=1), None)
    WIRE.reserve(1 << 30)
    yield made
    torch.cuda.synchronize()
    dist.destroy_process_group()
    WIRE.engine = "copy"


def inputs(seed: int, tokens: int = 384) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (1, tokens, RANKS * M, H)
    return [torch.randn(size, generator=generator, device="cuda").bfloat16() for _ in "qkv"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("graph", ["off", "auto"])
def test_every_plan_is_right(group: dist.ProcessGroup, plan: str, graph: str) -> None:
    """With spins on the caller's stream before and after, so that an edge to or from the divided card would show."""
    ulysses = SequenceParallelAttention(group, "ulysses")
    eager = SequenceParallelAttention(group, "hcms-zero", plan)
    tested = SequenceParallelAttention(group, "hcms-zero", plan, graph=graph)  # pyright: ignore[reportArgumentType]
    rng, sets = random.Random(0), [inputs(seed) for seed in range(3)]
    for turn in range(ROUNDS):
        qkv = sets[turn % 3]
        expected, wrong = replayed(group, ulysses, qkv)
        assert wrong == 0
        late = [torch.zeros_like(x) for x in qkv]
        tested.layer(*late)
        ghost.lay(group, RANKS * M, lambda qkv=qkv: eager(*qkv))
        tested.poison()
        WIRE.spoil()
        ghost.rewind(group)
        torch.cuda._sleep(rng.randrange(1_000_000))
        for x, given in zip(late, qkv, strict=True):
            x.copy_(given)
        out = tested(*late)
        for x in late:
            x.fill_(float("nan"))
        assert torch.equal(out, expected), (plan, turn)
        assert WIRE.wrong_bytes() == 0


def test_attention_and_communication_share_no_sm(group: dist.ProcessGroup) -> None:
    """A kernel per SM on one part leaves the other part free: both take as long together as alone."""
    divided = own_sms(CUDA, 8)
    assert divided is own_sms(CUDA, 8)
    assert len({stream.cuda_stream for stream in divided.values()}) == 4
    x = torch.randn(4096, 4096, device="cuda").bfloat16()

    def took_ms(streams: list[torch.cuda.Stream]) -> float:
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for stream in streams:
            stream.wait_event(begin)
            with torch.cuda.stream(stream):
                for _ in range(4):
                    x @ x
            torch.cuda.current_stream().wait_stream(stream)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    for streams in ([divided[COMPUTE]], [divided[COMM]], [divided[COMPUTE_2]]):
        took_ms(streams)
    few, many = took_ms([divided[COMM]]), took_ms([divided[COMPUTE]])
    assert few > 4 * many, "8 SMs should be far slower than the rest"
    assert took_ms([divided[COMM], divided[COMPUTE]]) < few + 0.5 * many


def test_exchanges_no_longer_wait_for_attention(group: dist.ProcessGroup) -> None:
    """At full size, under a persistent kernel: an exchange that becomes ready within an attention waits for its end,
    unless it has SMs of its own. (One that becomes ready as an attention does goes first, by its priority.)"""
    qkv = inputs(0, tokens=57_600 // RANKS)

    def longest_ms(plan: str) -> float:
        tested = SequenceParallelAttention(group, "hcms-zero", plan, "sdpa", record_timeline=True)
        spans = []
        for _ in range(3):
            ghost.lay(group, RANKS * M, lambda: tested(*qkv))
            ghost.rewind(group)
            tested(*qkv)
            assert tested.timeline is not None
            spans = [s for s in tested.timeline.spans if s.op.kind == "exchange" and s.op.chunk > 0]
        return max(s.end_ms - s.begin_ms for s in spans)

    blocked, free = longest_ms("even:max"), longest_ms("even:max+sms8")
    if torch.cuda.get_device_capability() == (9, 0):  # cuDNN's kernel holds every SM there
        assert free < 0.7 * blocked, (free, blocked)


def test_a_card_that_cannot_be_divided_so_is_refused(group: dist.ProcessGroup) -> None:
    with pytest.raises(RuntimeError, match=r"\+sms9999"):
        SequenceParallelAttention(group, "hcms-zero", "1-3-1+sms9999")(*inputs(0))
