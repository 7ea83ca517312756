"""The link that there is: NCCL between GPUs, Gloo between CPUs."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from hcms.links import Link, joining


def start(
    rank: int, ranks: int, device: torch.device, timeout: timedelta, store: dist.Store | None
) -> dist.ProcessGroup:
    """The default group over the device's own backend; a Gloo group for control."""
    where = joining(rank, ranks, timeout, store)
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, **where)
    else:
        dist.init_process_group("gloo", **where)
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    return control


LINK = Link("native", "the machine's own link", ("cuda", "cpu"), "each", start)
