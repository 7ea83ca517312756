"""Several real ranks on one card: NCCL, its kernels, lanes and ranks' skew are real; the link is the host's memory.

NCCL takes several ranks of one card from 2.30 on, and ranks run beside each other only under an MPS daemon: whoever
starts them sees to both (`hcms_lab.measure.one_card` does). Ranks share the SMs: what one waits for speeds the other
up, so times here tell methods from each other on this card, and nothing of a card alone.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from hcms.links import Link
from hcms.links.native import start

_SHARES = "NCCL_MULTI_RANK_GPU_ENABLE"


def place_on_card() -> tuple[int, int]:
    """`(i, n)`: this process is the i-th of n that share its card: all ranks, where NCCL was told that they do."""
    sharing = os.environ.get(_SHARES) == "1" and torch.cuda.device_count() == 1
    return (dist.get_rank(), dist.get_world_size()) if sharing else (0, 1)


LINK = Link(
    "shared",
    "several ranks on one card: NCCL, its kernels and ranks' skew are real; they share the SMs, and exchange through "
    "the host's memory",
    ("cuda",),
    "each",
    start,
    one_card=True,
    environment={
        _SHARES: "1",
        "NCCL_P2P_DISABLE": "1",  # through the host's memory: the card's own would be no link at all
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_MAX_CTAS": "4",  # few blocks: ranks' kernels wait for each other, so all of them must find SMs at once
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    },
)
