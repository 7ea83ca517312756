"""Calls against a ghost's peers, as tests on a card make them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.links import ghost
from hcms.links.ghost_wire import WIRE


def replayed(group: dist.ProcessGroup, attention: SequenceParallelAttention, qkv: list[Tensor]) -> tuple[Tensor, int]:
    """A call against peers that were laid down before, and how many of its bytes left wrong."""
    attention.layer(*qkv)
    ghost.lay(group, qkv[0].shape[2], lambda: attention(*qkv))
    attention.poison()
    WIRE.spoil()
    ghost.rewind(group)
    out = attention(*qkv)
    return out, WIRE.wrong_bytes()
