"""The transport that any c10d group gives: all-to-alls of packed slots."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hcms.schedule.schedule import Schedule
from hcms.transport import COLLECTIVE, Transport
from hcms.transport.layout import HeadExchange, LayerShape


def make(
    group: dist.ProcessGroup,
    schedule: Schedule,
    shape: LayerShape,
    dtype: torch.dtype,
    device: torch.device,
    **options: bool,
) -> HeadExchange:
    """As `hcms.transport.Make` says."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    return HeadExchange(schedule, ranks, shape, dtype, device, rank=rank, **options)


TRANSPORT = Transport(COLLECTIVE, "all-to-alls of the group's own backend", ("cpu", "cuda"), True, make)
