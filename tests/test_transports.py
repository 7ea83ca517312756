"""A transport is one file: a toy from a test carries every method's chunks, bit for bit, and is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.methods import METHODS
from hcms.programs.ring import _SentAndReceived
from hcms.transport import COLLECTIVE, Transport, transport, transports
from hcms.transport.layout import HeadExchange
from ranks import Place, on_ranks, own, whole_qkv

pytestmark = pytest.mark.t1

S, N, H = 24, 8, 16


class PeerByPeer(HeadExchange):
    """A send and a receive a peer, in place of an all-to-all."""

    def exchange(
        self, chunk: int, tensors: str, group: dist.ProcessGroup, async_op: bool, part: int = 0
    ) -> dist.Work | None:
        slots = self._chunks[chunk].messages[tensors, part].slots
        return self._swap(slots.send, slots.recv, group, async_op)

    def send_back(
        self, chunk: int, o_BSmH: Tensor, group: dist.ProcessGroup, async_op: bool, part: int = 0
    ) -> dist.Work | None:
        o_PlBmH = self.sendable(chunk, o_BSmH, part)
        return self._swap(o_PlBmH, self._chunks[chunk].returns[part].slots.recv, group, async_op)

    def _swap(self, send: Tensor, recv: Tensor, group: dist.ProcessGroup, async_op: bool) -> dist.Work | None:
        recv[self._rank].copy_(send[self._rank])
        operations = [
            dist.P2POp(what, slots[peer], group=group, group_peer=peer)
            for peer in range(self.ranks)
            if peer != self._rank
            for what, slots in ((dist.isend, send), (dist.irecv, recv))
        ]
        work = _SentAndReceived(dist.batch_isend_irecv(operations))
        if not async_op:
            work.wait()
        return work if async_op else None


def make(group: dist.ProcessGroup, *args: Any, **options: Any) -> PeerByPeer:
    schedule, *rest = args
    return PeerByPeer(schedule, dist.get_world_size(group), *rest, rank=dist.get_rank(group), **options)


TOY = Transport("toy", "a send and a receive a peer", ("cpu",), True, make)


def by_both(place: Place) -> dict[str, bool]:
    """Whether each method gives the same by the toy as by the collectives."""
    transports()[TOY.name] = TOY
    qkv = [own(place, x) for x in whole_qkv((1, S, N, H), torch.float32)]
    same = {}
    try:
        for name in (name for name, method in METHODS.items() if method.program != "ring"):
            for plan in ("even:2", "auto") if METHODS[name].cuts else ("even:1",):
                outs = []
                for carried in (COLLECTIVE, TOY.name):
                    attend = SequenceParallelAttention(place.gloo, name, plan, transport=carried)
                    attend(*qkv)
                    attend.poison()
                    outs.append(attend(*qkv))
                same[f"{name} {plan}"] = torch.equal(*outs)
    finally:
        del transports()[TOY.name]
    return same


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_toy_carries_every_method(ranks: int) -> None:
    for same in on_ranks(ranks, by_both):
        assert len(same) == 11
        assert [what for what, equal in same.items() if not equal] == []


def refusals(place: Place) -> list[str]:
    said = []
    for method, name in (("hcms", "carrier-pigeon"), ("ring", "copy-engine"), ("hcms-zero", "copy-engine")):
        try:
            attend = SequenceParallelAttention(place.gloo, method, "even:2", transport=name)
            attend(*(torch.zeros(1, 4, 4, H) for _ in "qkv"))
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_no_transport_can_do_is_refused_on_every_rank() -> None:
    for said in on_ranks(2, refusals):
        assert said == [
            f"unknown transport 'carrier-pigeon': choose one of {', '.join(transports())}",
            "ring goes by sends and receives, not by transport='copy-engine'",
            "transport='copy-engine' carries no tensors on cpu",
        ]


def test_every_transport_is_found_by_its_name() -> None:
    assert set(transports()) == {"collective", "copy-engine"}
    assert transport("collective").collectives and not transport("copy-engine").collectives
