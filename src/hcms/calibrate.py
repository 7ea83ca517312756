"""Measure what exchange and attention cost on these ranks: the profile that predictions and `plan="auto"` stand on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median_low
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.kernels import Kernel
from hcms.lanes.cuda import side_stream
from hcms.links import emulated, ghost
from hcms.objects import everyones, firsts
from hcms.occupancy import occupancy
from hcms.schedule.fit import fit
from hcms.schedule.profile import Profile
from hcms.schedule.schedule import COMM, serial
from hcms.transport import COLLECTIVE, Transport, transports
from hcms.transport.layout import HeadExchange, LayerShape

_ROUNDS, _REPEATS = {"cpu": 2, "cuda": 1}, 2
_WORST = {"fill_speedup": min}  # of the ranks' samples; of times and slowdowns the largest is
_SETTLED_MS, _SUSTAINED_MS = 200.0, 60.0  # until the clock has settled; then for each size
_SHORT_MS = 0.2  # a call this short may be over before the host has issued the next
_AHEAD_CYCLES = 3_000_000  # of a GPU, a millisecond or two
_CHUNKS_OF_HEADS = (1, 2, 3, 5, 10)


def calibrate(
    group: dist.ProcessGroup,
    shape: LayerShape,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Kernel,
    *,
    hardware: str,
    transport: Transport | None = None,
    ring: bool = False,
) -> Profile:
    """The profile of one layer shape on a group's ranks. Collective; every rank returns rank 0's profile.

    Runs whole exchanges of chunks of 1, 2, 3, 5, 10 and all M heads, piece by piece, and takes low medians of the
    slowest rank. It costs about two dozen attention calls, and on a GPU half a second of them back to back (more
    where four calls of all heads take longer); buffers are freed when it returns.

    Args:
        transport: what carries the exchanges; the collective one if None.
        ring: measure what Ring Attention alone does, too, where kernel and transport can. No automatic plan is one.
    """
    transport = transport or transports()[COLLECTIVE]
    measuring = _Measuring(group, device, shape.heads, transport)
    heads_first = device.type == "cpu"
    P, M = measuring.ranks, shape.heads // measuring.ranks
    sizes = sorted({h for h in _CHUNKS_OF_HEADS if h < M} | {M})
    # In rounds, so that a disturbance of a second or two spoils one round of a size and not all that is known of it.
    for _ in range(_ROUNDS[device.type]):
        for m in sizes:
            _measure_chunk(measuring, shape, m, dtype, kernel, heads_first, smallest=m == sizes[0], whole=m == M)
        if ring and P > 1 and kernel.gives_lse and transport.collectives:
            _measure_ring(measuring, shape, dtype, kernel)
    by_rank = everyones(measuring.samples, group)
    slowest = [
        {key: _WORST.get(key, max)(s[key] for s in ranks) for key in ranks[0] if key != "op"} | {"op": ranks[0]["op"]}
        for ranks in zip(*by_rank, strict=True)
    ]
    backend = dist.get_backend(group)
    pace = f"{emulated.PORT.gbps:g} GB/s, {emulated.PORT.latency_us:g} us" if backend == emulated.NAME else "native"
    # Medians are of the same samples everywhere, but one rank's word is what all act on.
    profile = fit(
        slowest,
        hardware=hardware,
        device=device.type,
        world_size=P,
        backend=backend,
        link=pace,
        kernel=kernel.name,
        dtype=str(dtype).removeprefix("torch."),
        head_dim=shape.head_dim,
        batch=shape.batch,
        sms=torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None,
    )
    if not any(s["op"] == "rotate" for s in measuring.samples):
        profile = replace(profile, assumed=("a ring's rotation, its log-sum-exp and its merging",))
    return firsts(profile, group)


class _Measuring:
    """Times pieces on all ranks at once and keeps the samples."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, heads: int, transport: Transport) -> None:
        self.group, self.device, self.heads, self.transport = group, device, heads, transport
        self.ranks = dist.get_world_size(group)
        self.samples: list[dict[str, Any]] = []

    def rewind(self) -> None:
        ghost.rewind(self.group)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once_ms(self, call: Callable[[], object]) -> float:
        """One call from a common start until its result is on the device."""
        self.rewind()
        self.synchronize()
        dist.barrier(self.group)
        self.synchronize()
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_AHEAD_CYCLES)  # what the host needs to issue a call is measured by itself
            begin.record()
            call()
            end.record()
            self.synchronize()
            return begin.elapsed_time(end)
        began_s = perf_counter()
        call()
        return (perf_counter() - began_s) * 1e3

    def take(self, op: str, call: Callable[[], object], *, warm: bool = True, **size: int) -> float:
        """Warm up, then `_REPEATS` samples of `op` at a size; returns the least time."""
        if warm:
            if dist.get_backend(self.group) == ghost.NAME:
                ghost.lay(self.group, self.heads, call)
            else:
                call()
        times_ms = [self.once_ms(call) for _ in range(_REPEATS)]
        self.samples += [{"op": op, "ms": ms, **size} for ms in times_ms]
        return min(times_ms)

    def slowest_ms(self, times_ms: Sequence[float]) -> float:
        """The least, over repeats, of the slowest rank's time: ranks that share a core take turns in being last."""
        return min(map(max, zip(*everyones(times_ms, self.group), strict=True)))


def _measure_chunk(
    measuring: _Measuring,
    shape: LayerShape,
    m: int,
    dtype: torch.dtype,
    kernel: Kernel,
    heads_first: bool,
    *,
    smallest: bool,
    whole: bool,
) -> None:
    """Every piece of one chunk of m heads, as the real exchange does it."""
    P, group, device = measuring.ranks, measuring.group, measuring.device
    B, L, H = shape.batch, shape.local_tokens, shape.head_dim
    exchange = measuring.transport.make(
        group, serial((m,)), LayerShape(B, L, m * P, H), dtype, device, heads_first=heads_first
    )
    inputs = {t: torch.randn(B, L, m * P, H, device=device).to(dtype) for t in "qkv"}
    out_BLNH = torch.empty_like(inputs["q"])
    tensor_bytes = out_BLNH.nbytes
    exchange.bind(inputs, out_BLNH)
    measuring.take("pack", lambda: exchange.pack(0, "qkv"), bytes=3 * tensor_bytes)

    exchange_ms = measuring.take(
        "exchange",
        lambda: exchange.exchange(0, "qkv", group, False),
        bytes_off_rank=3 * tensor_bytes * (P - 1) // P,
    )
    if heads_first and m > 1:
        measuring.take("unpack", lambda: exchange.receive(0, "qkv"), bytes=3 * tensor_bytes)
    exchange.receive(0, "qkv")
    qkv = exchange.chunk_qkv(0)
    attend_ms = measuring.take("attend", lambda: kernel.attend(*qkv), seq_len=P * L, heads=m)
    o_BSmH = kernel.attend(*qkv)
    measuring.take(
        "exchange", lambda: exchange.send_back(0, o_BSmH, group, False), bytes_off_rank=tensor_bytes * (P - 1) // P
    )
    measuring.take("unpack", lambda: exchange.receive_back(0), bytes=tensor_bytes)
    if smallest:
        _measure_host(measuring, exchange)
    if whole and P > 1:
        _measure_interference(measuring, exchange, kernel, qkv, attend_ms, exchange_ms)
        if device.type == "cuda":
            measuring.samples += _sustained(measuring, kernel, qkv, attend_ms)
            measuring.samples.append(occupancy(measuring, inputs, kernel, qkv, attend_ms))


def _measure_host(measuring: _Measuring, exchange: HeadExchange) -> None:
    """The issuing thread's time for one asynchronous exchange, without what other ranks on its core took of it."""
    issue_ms: list[float] = []
    on_host = measuring.device.type == "cpu"
    for _ in range(_REPEATS):
        measuring.rewind()
        measuring.synchronize()
        dist.barrier(measuring.group)
        began_s = perf_counter()
        work = exchange.exchange(0, "qkv", measuring.group, on_host)
        issue_ms.append((perf_counter() - began_s) * 1e3)
        if work is not None:
            work.wait()
    measuring.samples.append({"op": "host", "ms": min(issue_ms)})


def _measure_interference(
    measuring: _Measuring,
    exchange: HeadExchange,
    kernel: Kernel,
    qkv: list[Tensor],
    attend_ms: float,
    exchange_ms: float,
) -> None:
    """How much longer attention takes with a whole exchange beside it, by the time that the two overlap."""
    device, group = measuring.device, measuring.group
    side = side_stream(device, COMM) if device.type == "cuda" else None
    # The kernel reads copies: the exchange beside it writes the buffers that it would read.
    qkv = [x.clone() for x in qkv]

    def attend_beside() -> float:
        measuring.rewind()
        measuring.synchronize()
        dist.barrier(group)
        measuring.synchronize()
        if side is not None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(side):
                exchange.exchange(0, "qkv", group, False)
            begin.record()
            kernel.attend(*qkv)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)
        work = exchange.exchange(0, "qkv", group, True)
        began_s = perf_counter()
        kernel.attend(*qkv)
        took_ms = (perf_counter() - began_s) * 1e3
        if work is not None:
            work.wait()
        return took_ms

    alone_ms, beside_ms = zip(
        *((measuring.once_ms(lambda: kernel.attend(*qkv)), attend_beside()) for _ in range(_REPEATS)), strict=True
    )
    measuring.synchronize()
    overlap = min(1.0, exchange_ms / attend_ms)
    slowdown = 1 + (measuring.slowest_ms(beside_ms) / measuring.slowest_ms(alone_ms) - 1) / overlap
    measuring.samples.append({"op": "interference", "attention_slowdown": slowdown, "communication_slowdown": 1.0})


def _sustained(measuring: _Measuring, kernel: Kernel, qkv: list[Tensor], attend_ms: float) -> list[dict[str, Any]]:
    """Attention of each size in a block without a pause, when the clock has settled; nothing of calls that are short.

    A call by itself runs at a higher clock, a short one more so than a long one, which slows down while it runs.
    """
    M = qkv[0].shape[2]
    attend_ms = measuring.slowest_ms([attend_ms])  # every rank's sizes are the same
    sizes = [m for m in (M, *_CHUNKS_OF_HEADS) if m <= M and attend_ms * m / M >= _SHORT_MS]
    measuring.synchronize()
    dist.barrier(measuring.group)
    events: dict[int, list[torch.cuda.Event]] = {}
    for m in dict.fromkeys(sizes):
        some = [x[:, :, :m] for x in qkv]
        block_ms = _SUSTAINED_MS + (0.0 if events else _SETTLED_MS)
        calls = max(4, math.ceil(block_ms / (attend_ms * m / M)))
        events[m] = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        for event in events[m][:-1]:
            event.record()
            kernel.attend(*some)
        events[m][-1].record()
    measuring.synchronize()
    return [
        {
            "op": "sustained",
            "seq_len": qkv[0].shape[1],
            "heads": m,
            "ms": median_low([a.elapsed_time(b) for a, b in pairwise(its[len(its) // 2 :])]),
        }
        for m, its in events.items()
    ]


def _measure_ring(measuring: _Measuring, shape: LayerShape, dtype: torch.dtype, kernel: Kernel) -> None:
    """One rotation and one step with the log-sum-exp."""
    group, device, P = measuring.group, measuring.device, measuring.ranks
    B, L, N, H = shape.batch, shape.local_tokens, shape.heads, shape.head_dim
    leaving = torch.randn(2, B, L, N, H, device=device).to(dtype)
    arriving = torch.empty_like(leaving)
    rank = dist.get_rank(group)

    def rotate() -> None:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, leaving, group=group, group_peer=(rank + 1) % P),
                dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % P),
            ]
        )
        for work in works:
            work.wait()

    measuring.take("rotate", rotate, bytes_off_rank=leaving.nbytes)
    if kernel.attend_lse is not None:
        q_BLNH, k_BLNH, v_BLNH = leaving[0], leaving[1], arriving[0]
        attend_lse = kernel.attend_lse
        measuring.take("attend_lse", lambda: attend_lse(q_BLNH, k_BLNH, v_BLNH), seq_len=L, heads=N)
        merged = torch.zeros(B, L, N, H, device=device)
        share = torch.rand(B, L, N, 1, device=device)
        measuring.take("merge", lambda: merged.lerp_(q_BLNH.float(), share), bytes=merged.nbytes)
