"""The ghost link whose bytes a kernel moves: what a transport that needs SMs, as NCCL does, does to attention."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from hcms.links import Link, ghost
from hcms.links.ghost_wire import WIRE


def start(
    rank: int, ranks: int, device: torch.device, timeout: timedelta, store: dist.Store | None
) -> dist.ProcessGroup:
    """As of the ghost link, its wire driven by SMs from here on."""
    group = ghost.start(rank, ranks, device, timeout, store)
    WIRE.engine = "sm"
    return group


LINK = Link(
    "ghost-sm",
    "the ghost link with its bytes moved by a kernel of a few blocks, as NCCL moves them: it needs SMs",
    ghost.LINK.devices,
    ghost.LINK.processes,
    start,
)
