"""The process group of a script that `torchrun` started."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn


def group_or_default(group: dist.ProcessGroup | None, models: list[nn.Module]) -> dist.ProcessGroup:
    """The given group, or the default one, which is made if there is none; no group is made beside it.

    Raises:
        ValueError: there is none, nor torchrun's environment; a model is on another device than this rank's.
    """
    if group is not None:
        return group
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "no process group and no torchrun: start the script with `torchrun --nproc_per_node <ranks>`, or call "
                "torch.distributed.init_process_group() before hcms.parallelize()"
            )
        timeout = timedelta(minutes=30)  # a rank may wait while another loads weights
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)  # so that a later .to("cuda") goes to this rank's own
            dist.init_process_group("nccl", device_id=device, timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    if "nccl" in str(dist.get_backend()):
        own = torch.device("cuda", torch.cuda.current_device())
        for model in models:
            at = next(model.parameters()).device
            if at.type == "cuda" and at != own:
                raise ValueError(
                    f"this rank's device is {own}, but the model is on {at}: call hcms.parallelize() before moving it "
                    f"to CUDA, or move it to {own}"
                )
    default = dist.group.WORLD
    assert default is not None
    return default
