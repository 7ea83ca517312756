"""fast-ulysses: whole tensors by copy engines into peers' memory, around the run's kernel.

Written against 0.2.1, whose wheels want torch 2.13. It has not run on a card: those at hand had torch 2.11.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hcms_lab.measure.peers import Entry, register

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention

SCATTER_HEADS, GATHER_HEADS = 0, 1


def attention(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """Four exchanges of `UlyssesGroup`: peers write Q, K and V where attention reads them, the result is the caller's.

    Raises:
        ValueError: on all ranks alike: NCCL is kept from the cards' own link, or ranks share a card. It would go past
            the link that the run measures.
    """
    import torch

    from hcms.links.native_host import P2P_DISABLE
    from hcms.objects import everyones

    cards = everyones(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid), group)
    if os.environ.get(P2P_DISABLE) == "1" or len(set(cards)) < len(cards):
        raise ValueError("fast-ulysses goes past NCCL, over the own link of a card for each rank: link.kind=native")
    from fast_ulysses import UlyssesGroup  # pyright: ignore[reportMissingImports]

    ulysses = UlyssesGroup(group, torch.device("cuda", torch.cuda.current_device()))
    gathered: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        inputs_BLNH = [x.contiguous() for x in (q_BLNH, k_BLNH, v_BLNH)]
        key = (q_BLNH.shape, q_BLNH.dtype)
        if key not in gathered:  # collective, at the first call of a size
            gathered[key] = [ulysses.empty_output(x, mode=SCATTER_HEADS) for x in inputs_BLNH]
        for x_BLNH, x_BSMH in zip(inputs_BLNH, gathered[key], strict=True):
            ulysses.all_to_all_4d(x_BLNH, mode=SCATTER_HEADS, out=x_BSMH)
        return ulysses.all_to_all_4d(kernel.attend(*gathered[key]).contiguous(), mode=GATHER_HEADS)

    return attend


register(Entry("fast-ulysses", "ulysses", attention, "fast-ulysses", "fast_ulysses", gpus_only=True))
