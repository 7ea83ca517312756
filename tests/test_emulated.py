"""The emulated link against its own parameters: bytes over bandwidth plus latency, on one port, by a shared clock.

Lower bounds are strict: a link that is faster than it says is wrong. Upper bounds leave room for a busy machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, process_time, sleep
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from hcms.links import emulated
from ranks import Place, new_group, on_ranks

pytestmark = pytest.mark.t1

GBPS = 0.002  # 2 bytes a microsecond
LATENCY_US = 20_000.0
SLACK_S = 0.5
ELEMENTS = 8192  # of float32, so 32,768 bytes: 16 ms


@dataclass(frozen=True)
class Moment:
    """A work on one rank, on the host's monotonic clock, in s."""

    issued_s: float
    done_s: float
    right: bool  # the data arrived as it should


def _filled(place: Place, rank: int, elements: int = ELEMENTS) -> Tensor:
    """What `rank` sends: ramps that tell ranks and places apart."""
    return torch.arange(elements, dtype=torch.float32) + 1000 * rank


Started = tuple[Any, Callable[[], bool]]  # a work, and whether its data is right


def all_to_all_single(place: Place, group: dist.ProcessGroup) -> Started:
    out = torch.empty(ELEMENTS)
    work = dist.all_to_all_single(out, _filled(place, place.rank), group=group, async_op=True)
    expected = [_filled(place, r).chunk(place.ranks)[place.rank] for r in range(place.ranks)]
    return work, lambda: torch.equal(out, torch.cat(expected))


def uneven_all_to_all_single(place: Place, group: dist.ProcessGroup) -> Started:
    """Rank r sends r + 1 rows to every peer."""
    rows = [r + 1 for r in range(place.ranks)]
    out = torch.empty(sum(rows), 1024)
    send = _filled(place, place.rank, place.ranks * (place.rank + 1) * 1024).view(-1, 1024)
    work = dist.all_to_all_single(
        out,
        send,
        output_split_sizes=rows,
        input_split_sizes=[place.rank + 1] * place.ranks,
        group=group,
        async_op=True,
    )
    sent = [_filled(place, r, place.ranks * (r + 1) * 1024).view(-1, 1024) for r in range(place.ranks)]
    expected = torch.cat([x.chunk(place.ranks)[place.rank] for x in sent])
    return work, lambda: torch.equal(out, expected)


def all_to_all_of_lists(place: Place, group: dist.ProcessGroup) -> Started:
    outs = [torch.empty(ELEMENTS // place.ranks) for _ in range(place.ranks)]
    parts = [part.clone() for part in _filled(place, place.rank).chunk(place.ranks)]
    work = dist.all_to_all(outs, parts, group=group, async_op=True)
    return work, lambda: all(
        torch.equal(out, _filled(place, r).chunk(place.ranks)[place.rank]) for r, out in enumerate(outs)
    )


def all_gather(place: Place, group: dist.ProcessGroup) -> Started:
    outs = [torch.empty(ELEMENTS) for _ in range(place.ranks)]
    work = dist.all_gather(outs, _filled(place, place.rank), group=group, async_op=True)
    return work, lambda: all(torch.equal(out, _filled(place, r)) for r, out in enumerate(outs))


def all_gather_into_tensor(place: Place, group: dist.ProcessGroup) -> Started:
    out = torch.empty(place.ranks * ELEMENTS)
    work = dist.all_gather_into_tensor(out, _filled(place, place.rank), group=group, async_op=True)
    return work, lambda: torch.equal(out, torch.cat([_filled(place, r) for r in range(place.ranks)]))


def all_reduce(place: Place, group: dist.ProcessGroup) -> Started:
    x = _filled(place, place.rank)
    work = dist.all_reduce(x, group=group, async_op=True)
    return work, lambda: torch.equal(x, torch.stack([_filled(place, r) for r in range(place.ranks)]).sum(0))


def broadcast(place: Place, group: dist.ProcessGroup) -> Started:
    x = _filled(place, place.rank)
    work = dist.broadcast(x, src=0, group=group, async_op=True)
    return work, lambda: torch.equal(x, _filled(place, 0))


COLLECTIVES: dict[str, tuple[Callable[[Place, dist.ProcessGroup], Started], Callable[[int, int], float]]] = {
    # how to start it; how many bytes leave a rank of P
    "all_to_all_single": (all_to_all_single, lambda rank, P: 4 * ELEMENTS * (P - 1) / P),
    "uneven": (uneven_all_to_all_single, lambda rank, P: 4 * 1024 * (rank + 1) * (P - 1)),
    "lists": (all_to_all_of_lists, lambda rank, P: 4 * ELEMENTS * (P - 1) / P),
    "all_gather": (all_gather, lambda rank, P: 4 * ELEMENTS * (P - 1)),
    "all_gather_into_tensor": (all_gather_into_tensor, lambda rank, P: 4 * ELEMENTS * (P - 1)),
    "all_reduce": (all_reduce, lambda rank, P: 2 * 4 * ELEMENTS * (P - 1) / P),
    "broadcast": (broadcast, lambda rank, P: 4 * ELEMENTS * (rank == 0) * (P > 1)),
}


def paced(place: Place, name: str, late_rank: int | None = None, late_s: float = 0.0, times: int = 1) -> list[Moment]:
    """Issue a collective `times` times at once, one rank perhaps late, and wait for all in order."""
    start, _ = COLLECTIVES[name]
    emulated.set_link(GBPS, LATENCY_US)
    try:
        dist.barrier(place.control)
        if place.rank == late_rank:
            sleep(late_s)
        issued = []
        for _ in range(times):
            now_s = monotonic()
            issued.append((now_s, *start(place, place.emulated)))
        moments = []
        for issued_s, work, right in issued:
            work.wait()
            done_s = monotonic()
            moments.append(Moment(issued_s, done_s, right()))
        return moments
    finally:
        emulated.set_link()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_bytes_over_bandwidth_plus_latency(name: str, ranks: int) -> None:
    _, leaving = COLLECTIVES[name]
    moments = [first for (first,) in on_ranks(ranks, paced, name)]
    wire_s = [leaving(r, ranks) / (GBPS * 1e9) for r in range(ranks)]
    arrives_s = max(moment.issued_s + wire for moment, wire in zip(moments, wire_s, strict=True)) + LATENCY_US * 1e-6
    for moment in moments:
        assert moment.right
        assert arrives_s <= moment.done_s <= arrives_s + SLACK_S


def charged(place: Place, name: str) -> tuple[int, int]:
    """Works and bytes that the port is charged for one collective."""
    works, sent_bytes = emulated.PORT.works, emulated.PORT.sent_bytes
    COLLECTIVES[name][0](place, place.emulated)[0].wait()
    return emulated.PORT.works - works, emulated.PORT.sent_bytes - sent_bytes


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_what_leaves_a_rank_is_charged_and_no_more(name: str, ranks: int) -> None:
    _, leaving = COLLECTIVES[name]
    assert on_ranks(ranks, charged, name) == [(1, leaving(rank, ranks)) for rank in range(ranks)]


def test_a_late_sender_delays_its_receivers() -> None:
    early, late = (moments[0] for moments in on_ranks(2, paced, "all_to_all_single", 1, 0.15))
    assert late.issued_s >= early.issued_s + 0.1
    arrives_s = late.issued_s + 4 * ELEMENTS / 2 / (GBPS * 1e9) + LATENCY_US * 1e-6
    assert arrives_s <= early.done_s <= arrives_s + SLACK_S


def test_works_queue_on_the_port() -> None:
    """Three works at once: bytes add up, the latency does not."""
    for moments in on_ranks(2, paced, "all_to_all_single", None, 0.0, 3):
        one_s = 4 * ELEMENTS / 2 / (GBPS * 1e9)
        for count, moment in enumerate(moments, start=1):
            arrives_s = moments[0].issued_s + count * one_s + LATENCY_US * 1e-6
            assert arrives_s <= moment.done_s <= arrives_s + SLACK_S
            assert moment.right


def on_two_groups(place: Place) -> list[Moment]:
    groups = [place.emulated, new_group(emulated.NAME)]
    emulated.set_link(GBPS, LATENCY_US)
    try:
        dist.barrier(place.control)
        issued = [(monotonic(), *all_to_all_single(place, group)) for group in groups]
        moments = []
        for issued_s, work, right in reversed(issued):
            work.wait()
            moments.append(Moment(issued_s, monotonic(), right()))
        return moments[::-1]
    finally:
        emulated.set_link()


def test_all_groups_share_one_port() -> None:
    for first, second in on_ranks(2, on_two_groups):
        assert second.done_s >= first.issued_s + 2 * 4 * ELEMENTS / 2 / (GBPS * 1e9) + LATENCY_US * 1e-6
        assert first.right
        assert second.right


def there_and_back(place: Place) -> tuple[Moment, Moment]:
    """Both ranks send and receive at once: a full-duplex port. Then rank 0 alone sends, and rank 1 receives."""
    peer = 1 - place.rank
    got = torch.empty(ELEMENTS)
    emulated.set_link(GBPS, LATENCY_US)
    try:
        dist.barrier(place.control)
        issued_s = monotonic()
        operations = [
            dist.P2POp(dist.isend, _filled(place, place.rank), group=place.emulated, group_peer=peer),
            dist.P2POp(dist.irecv, got, group=place.emulated, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        both = Moment(issued_s, monotonic(), torch.equal(got, _filled(place, peer)))
        dist.barrier(place.control)
        issued_s = monotonic()
        if place.rank == 0:
            dist.send(_filled(place, 0, 2 * ELEMENTS), dst=1, group=place.emulated)
            return both, Moment(issued_s, monotonic(), True)
        got = torch.empty(2 * ELEMENTS)
        dist.recv(got, src=0, group=place.emulated)
        return both, Moment(issued_s, monotonic(), torch.equal(got, _filled(place, 0, 2 * ELEMENTS)))
    finally:
        emulated.set_link()


def test_send_and_receive() -> None:
    moments = on_ranks(2, there_and_back)
    wire_s, latency_s = 4 * ELEMENTS / (GBPS * 1e9), LATENCY_US * 1e-6
    both = [m for m, _ in moments]
    arrives_s = max(m.issued_s for m in both) + wire_s + latency_s
    for moment in both:
        assert moment.right
        assert moment.issued_s + wire_s + latency_s <= moment.done_s <= arrives_s + SLACK_S
    assert max(m.done_s for m in both) >= arrives_s
    sent, received = (m for _, m in moments)
    for moment in (sent, received):
        assert moment.right
        assert sent.issued_s + 2 * wire_s + latency_s <= moment.done_s <= received.issued_s + 2 * wire_s + 2 * SLACK_S


def functional_calls(place: Place) -> dict[str, Moment]:
    """torch's functional collectives, as torch.compile and DTensor use them."""
    x = _filled(place, place.rank)
    whole = torch.cat([_filled(place, r) for r in range(place.ranks)])
    exchanged = torch.cat([_filled(place, r).chunk(place.ranks)[place.rank] for r in range(place.ranks)])
    calls = {
        "all_to_all_single": (lambda: functional.all_to_all_single(x, None, None, place.emulated), exchanged),
        "all_gather": (lambda: functional.all_gather_tensor(x, 0, place.emulated), whole),
        "all_reduce": (
            lambda: functional.all_reduce(x, "sum", place.emulated),
            sum(_filled(place, r) for r in range(place.ranks)),
        ),
    }
    for call, _ in calls.values():
        call()  # a first call of each imports and compiles
    emulated.set_link(GBPS, LATENCY_US)
    moments = {}
    try:
        for name, (call, expected) in calls.items():
            dist.barrier(place.control)
            issued_s = monotonic()
            got = call()
            right = torch.equal(got + 0, expected)  # pyright: ignore[reportArgumentType]
            moments[name] = Moment(issued_s, monotonic(), right)
    finally:
        emulated.set_link()
    return moments


def test_functional_collectives() -> None:
    by_rank = on_ranks(2, functional_calls)
    for name in by_rank[0]:
        wire_s = COLLECTIVES[name][1](0, 2) / (GBPS * 1e9)
        arrives_s = max(moments[name].issued_s for moments in by_rank) + wire_s + LATENCY_US * 1e-6
        for moments in by_rank:
            assert moments[name].right
            assert arrives_s <= moments[name].done_s <= arrives_s + SLACK_S


def waiting(place: Place) -> tuple[float, float]:
    """Seconds of a core, and seconds by the clock, that a wait of about 0.3 s takes."""
    emulated.set_link(4 * ELEMENTS / 2 / 0.3e9, 0.0)
    try:
        dist.barrier(place.control)
        work, _ = all_to_all_single(place, place.emulated)
        cpu_s, wall_s = process_time(), monotonic()
        work.wait()
        return process_time() - cpu_s, monotonic() - wall_s
    finally:
        emulated.set_link()


def test_waiting_costs_no_core() -> None:
    for cpu_s, wall_s in on_ranks(2, waiting):
        assert wall_s >= 0.25
        assert cpu_s <= 0.05


def unlimited(place: Place) -> list[float]:
    """Without a bandwidth, what a link is charged is its latency alone; and the port starts no earlier than now."""
    arrivals = []
    for gbps, latency_us in ((None, 0.0), (None, LATENCY_US), (math.inf, 0.0)):
        emulated.set_link(gbps, latency_us)
        now_s = monotonic()
        arrivals.append(emulated.PORT.leave(10**9) - now_s)
    emulated.set_link()
    return arrivals


def test_without_a_bandwidth() -> None:
    (arrivals,) = on_ranks(1, unlimited)
    for arrives_s, latency_s in zip(arrivals, (0.0, LATENCY_US * 1e-6, 0.0), strict=True):
        assert latency_s <= arrives_s < latency_s + 0.1


@pytest.mark.parametrize("gbps", [0, 0.0, -1.0, math.nan])
def test_a_bandwidth_must_be_positive(gbps: float) -> None:
    with pytest.raises(ValueError, match=rf"needs a bandwidth above 0 GB/s, got {gbps}"):
        emulated.set_link(gbps)


@pytest.mark.parametrize("latency_us", [-1.0, math.nan])
def test_a_latency_cannot_be_negative(latency_us: float) -> None:
    with pytest.raises(ValueError, match=rf"needs a latency of at least 0 µs, got {latency_us}"):
        emulated.set_link(1.0, latency_us)


def names(place: Place) -> tuple[str, str, int, int]:
    group = place.emulated
    return dist.get_backend(group), group.name(), dist.get_world_size(group), dist.get_rank(group)


def test_the_backend_has_its_name() -> None:
    assert emulated.NAME == "emulated"
    assert on_ranks(2, names) == [("emulated", "emulated", 2, r) for r in range(2)]


def objects(place: Place) -> list[Any]:
    """What torch builds on collectives works too, as libraries use it."""
    gathered: list[Any] = [None] * place.ranks
    dist.all_gather_object(gathered, {"rank": place.rank}, group=place.emulated)
    word = ["from 0"] if place.rank == 0 else [None]
    dist.broadcast_object_list(word, src=0, group=place.emulated)
    dist.barrier(place.emulated)
    return [*gathered, *word]


def test_objects_and_barriers() -> None:
    assert on_ranks(2, objects) == [[{"rank": 0}, {"rank": 1}, "from 0"]] * 2
