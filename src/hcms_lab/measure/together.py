"""What ranks do together around a measurement: start a call at one time, and tell each other what it gave."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hcms_lab.measure.launch import Rank


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
