"""What ranks tell each other in Python objects: c10d's own object collectives, but for NumPy, which those need.

Objects travel as pickles among the ranks of one program. All functions are collective.
"""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def everyones(mine: T, group: dist.ProcessGroup) -> list[T]:
    """What each rank of the group gives, in rank order."""
    data = _packed(mine, group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=data.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([data.numel()], device=data.device), group=group)
    nbytes = [int(size.item()) for size in sizes]
    padded = torch.zeros(max(nbytes), dtype=torch.uint8, device=data.device)
    padded[: data.numel()] = data
    arrived = [torch.empty_like(padded) for _ in nbytes]
    dist.all_gather(arrived, padded, group=group)
    return [_unpacked(each[:n]) for each, n in zip(arrived, nbytes, strict=True)]


def firsts(mine: T, group: dist.ProcessGroup) -> T:
    """What rank 0 of the group gives."""
    first = dist.get_global_rank(group, 0)
    data = _packed(mine, group)
    size = torch.tensor([data.numel()], device=data.device)
    dist.broadcast(size, first, group=group)
    if dist.get_rank(group) != 0:
        data = torch.empty(int(size.item()), dtype=torch.uint8, device=data.device)
    dist.broadcast(data, first, group=group)
    return _unpacked(data)


def _packed(value: Any, group: dist.ProcessGroup) -> Tensor:
    """Bytes where the group's collectives take them."""
    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)


def _unpacked(data: Tensor) -> Any:
    return pickle.loads(bytes(data.tolist()))
