"""What attention leaves of a GPU to others while it runs: measured, as no kernel's documentation says it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median_low
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.kernels import Kernel
from hcms.lanes.cuda import side_stream
from hcms.schedule.schedule import COMM, COMPUTE_2
from hcms.schedule.zero import zero
from hcms.transport import Transport
from hcms.transport.layout import LayerShape

_REPEATS = 3
_BLOCKED = 0.5  # of the attention that was left when it was issued: waited that long, it was held up by it
_INTO = 0.25  # how far into an attention the other work is issued


class Measuring(Protocol):
    group: dist.ProcessGroup
    device: torch.device
    transport: Transport

    def rewind(self) -> None: ...
    def synchronize(self) -> None: ...


def occupancy(
    measuring: Measuring, inputs: dict[str, Tensor], kernel: Kernel, qkv: list[Tensor], attend_ms: float
) -> dict[str, Any]:
    """A sample for `fit`: does attention hold every SM, does an exchange need one, what do two lanes give.

    Copies and exchanges are issued while attention of all heads runs, and take either their own time or until its end.
    The exchange moves bytes alone, as `hcms-zero`'s does: a copy of the own share would need SMs on any transport.
    Collective.

    Args:
        inputs: `q`, `k`, `v` `[B, L, N, H]`.
        qkv: `q_BSMH`, `k_BSMH`, `v_BSMH` to attend to.
        attend_ms: what attention to them takes alone.
    """
    B, L, N, H = inputs["q"].shape
    ranks = dist.get_world_size(measuring.group)
    exchange = measuring.transport.make(
        measuring.group,
        zero((N // ranks,)),
        LayerShape(B, L, N, H),
        inputs["q"].dtype,
        measuring.device,
        own_apart=True,
    )
    exchange.bind(inputs, torch.empty_like(inputs["q"]))
    exchange.pack(0, "qkv")
    qkv = [x.clone() for x in qkv]
    side = side_stream(measuring.device, COMM)

    def took_ms(work: Callable[[], object], *, beside: bool) -> float:
        measuring.rewind()
        measuring.synchronize()
        dist.barrier(measuring.group)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if beside:
            kernel.attend(*qkv)
            time.sleep(_INTO * attend_ms / 1e3)
        with torch.cuda.stream(side):
            begin.record()
            work()
            end.record()
        measuring.synchronize()
        return begin.elapsed_time(end)

    def held_up(work: Callable[[], object]) -> bool:
        """Whether it took longer beside attention than alone by most of the attention that was left."""
        took_ms(work, beside=False)
        longer_ms = [took_ms(work, beside=True) - took_ms(work, beside=False) for _ in range(_REPEATS)]
        return median_low(longer_ms) > _BLOCKED * (1 - _INTO) * attend_ms

    return {
        "op": "occupancy",
        "holds_sms": held_up(lambda: exchange.pack(0, "qkv")),
        "wire_needs_sms": held_up(lambda: exchange.exchange(0, "qkv", measuring.group, False)),
        "fill_speedup": _fill_speedup(measuring, kernel, qkv),
    }


def _fill_speedup(measuring: Measuring, kernel: Kernel, qkv: list[Tensor]) -> float:
    """Attention head by head on one stream, over the same on two in turn."""
    second = side_stream(measuring.device, COMPUTE_2)
    heads = range(min(6, qkv[0].shape[2]))

    def once_ms(streams: list[torch.cuda.Stream]) -> float:
        current = torch.cuda.current_stream(measuring.device)
        measuring.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        second.wait_stream(current)
        for m in heads:
            with torch.cuda.stream(streams[m % len(streams)]):
                kernel.attend(*(x[:, :, m : m + 1] for x in qkv))
        current.wait_stream(second)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    current = torch.cuda.current_stream(measuring.device)
    once_ms([current, second])
    in_turn = [(once_ms([current]), once_ms([current, second])) for _ in range(_REPEATS)]
    return median_low([one / two for one, two in in_turn])
