"""The machinery alone: a warm call whose kernel and link cost nothing, so that what is left is the host's own work.

The link is torch's "fake" process group, whose collectives end at once and move nothing; the kernel hands out one
output made before. Both are real parts of the call's way, and everything between them runs as it always does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from hcms.attention import SequenceParallelAttention
from hcms.kernels import Kernel
from hcms.lanes import Lanes
from hcms.lanes.cpu import CpuLanes

HEAD_DIM = 16
TOKENS_A_RANK = 4


@contextmanager
def free_link(ranks: int) -> Iterator[None]:
    """A default process group of `ranks` ranks, of which this process is the first, on a link that costs nothing.

    Raises:
        RuntimeError: there is a default group already.
    """
    if dist.is_initialized():
        raise RuntimeError("the machinery is measured in a process without process groups, and this one has some")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def free_kernel() -> Kernel:
    """A kernel that computes nothing: of each shape it gives one output `o_BSmH`, made at the first call."""
    outputs: dict[torch.Size, Tensor] = {}

    def attend(q_BSmH: Tensor, k_BTmH: Tensor, v_BTmH: Tensor) -> Tensor:
        if q_BSmH.shape not in outputs:
            outputs[q_BSmH.shape] = torch.zeros(q_BSmH.shape, dtype=q_BSmH.dtype)
        return outputs[q_BSmH.shape]

    return Kernel("free", attend, None)


class FreeAttention(SequenceParallelAttention):
    """A method on the free link with the free kernel; use it under `free_link`."""

    def __init__(self, method: str, plan: str, *, record_timeline: bool = False) -> None:
        super().__init__(None, method, plan, record_timeline=record_timeline)
        self.kernel = free_kernel()

    def _make_lanes(self, device: torch.device) -> Lanes:
        return CpuLanes(self.group, {})


def small_inputs(heads: int) -> dict[str, Tensor]:
    """`q_BLNH`, `k_BLNH` and `v_BLNH` so small that copying them takes no time."""
    generator = torch.Generator().manual_seed(0)
    size = (1, TOKENS_A_RANK, heads, HEAD_DIM)
    return {f"{name}_BLNH": torch.randn(size, generator=generator) for name in "qkv"}


class Operations(TorchDispatchMode):
    """Counts what torch's dispatcher sees while it is entered, by name: `aten.copy_`, `c10d.alltoall_base_`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        self.counts[f"{func.namespace}.{func._schema.name.split('::')[1]}"] += 1
        return func(*args, **(kwargs or {}))


def host_times_ms(attention: FreeAttention, inputs_BLNH: dict[str, Tensor], calls: int, warmup: int) -> list[float]:
    """The time of each of `calls` warm calls."""
    for _ in range(warmup):
        attention(**inputs_BLNH)
    times_ms = []
    for _ in range(calls):
        began_s = perf_counter()
        attention(**inputs_BLNH)
        times_ms.append((perf_counter() - began_s) * 1e3)
    return times_ms
