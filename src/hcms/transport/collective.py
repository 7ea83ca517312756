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
    *,
    heads_first: bool = False,
    own_apart: bool = False,
) -> HeadExchange:
    return HeadExchange(
        schedule,
        dist.get_world_size(group),
        shape,
        dtype,
        device,
        heads_first=heads_first,
        rank=dist.get_rank(group),
        own_apart=own_apart,
    )


TRANSPORT = Transport(COLLECTIVE, "all-to-alls of the group's own backend", ("cpu", "cuda"), True, make)
