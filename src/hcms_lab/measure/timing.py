"""How a call is timed: alone, or in a block of its own back-to-back calls.

A GPU's clock depends on what it has been doing. Serial Ulysses rests the SMs while it communicates and attends at a
higher clock afterwards; a pipeline that overlaps never rests and runs at the card's power limit. So a single call after
a pause flatters overlap, and what a user gets, one layer after the other, is a block of calls (`sustained`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hcms_lab.measure.launch import Rank
from hcms_lab.measure.sensors import Sensors

_AHEAD = 2  # calls that the host may be ahead of the device in a block, as in a model's layers
_FEWEST, _MOST = 2, 1000  # calls a block


@dataclass(frozen=True)
class Sample:
    """One round of one contestant on one rank. `ms` is the latency; `host_ms` what the host took to issue a call."""

    ms: float
    host_ms: float | None = None
    sm_clock_mhz: float | None = None
    power_w: float | None = None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_call(rank: Rank, call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """One call after a barrier, in ms until its result is on the device. The barrier is outside the clock."""
    synchronize(rank.device)
    dist.barrier(rank.control)
    began_s = perf_counter()
    out = call()
    synchronize(rank.device)
    return out, (perf_counter() - began_s) * 1e3


def gathered(rank: Rank, value: Any) -> list[Any]:
    """`value` of every rank, on every rank, over the control group."""
    values: list[Any] = [None] * rank.ranks
    dist.all_gather_object(values, value, group=rank.control)
    return values


def calls_a_block(rank: Rank, call: Callable[[], Tensor], block_ms: float) -> int:
    """As many calls as fill a block, the same on every rank."""
    _, ms = timed_call(rank, call)
    slowest_ms = max(gathered(rank, ms))
    return min(_MOST, max(_FEWEST, round(block_ms / max(slowest_ms, 1e-3))))


def block(rank: Rank, call: Callable[[], Tensor], calls: int, sensors: Sensors, rewind: Callable[[], None]) -> Sample:
    """Back-to-back calls on a GPU, the host two ahead at most; medians of the second half, as the clock has settled."""
    synchronize(rank.device)
    dist.barrier(rank.control)
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2))
    host_ms: list[float] = []
    with sensors.watch() as seen:
        for i in range(calls):
            rewind()
            begins[i].record()
            began_s = perf_counter()
            call()
            host_ms.append((perf_counter() - began_s) * 1e3)
            ends[i].record()
            if i >= _AHEAD:
                ends[i - _AHEAD].synchronize()
        synchronize(rank.device)
    late = slice(calls // 2, None)
    times_ms = [begin.elapsed_time(end) for begin, end in zip(begins[late], ends[late], strict=True)]
    return Sample(median(times_ms), median(host_ms[late]), seen.get("sm_clock_mhz"), seen.get("power_w"))


def single(
    rank: Rank, call: Callable[[], Tensor], rest_ms: float, sensors: Sensors, rewind: Callable[[], None]
) -> Sample:
    """One call on a GPU after a pause."""
    synchronize(rank.device)
    time.sleep(rest_ms / 1e3)
    dist.barrier(rank.control)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    rewind()
    with sensors.watch() as seen:
        begin.record()
        began_s = perf_counter()
        call()
        host_ms = (perf_counter() - began_s) * 1e3
        end.record()
        synchronize(rank.device)
    return Sample(begin.elapsed_time(end), host_ms, seen.get("sm_clock_mhz"), seen.get("power_w"))
