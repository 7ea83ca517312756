"""yunchang's asynchronous Ulysses: one head a step, exchanges on a side stream. Needs a GPU: it makes CUDA streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hcms_lab.measure.peers import Entry, register
from hcms_lab.measure.peers.yunchang_ulysses import only_qkv

if TYPE_CHECKING:
    import torch.distributed as dist

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention


def attention(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """`AsyncLongContextAttention`, all ranks in its Ulysses group, around the run's kernel. Collective."""
    import torch.distributed as dist
    from yunchang import AsyncLongContextAttention, set_seq_parallel_pg

    set_seq_parallel_pg(dist.get_world_size(group), 1, dist.get_rank(group), dist.get_world_size(group))
    layer = AsyncLongContextAttention()
    layer.ring_attn_fn = only_qkv(kernel)  # a ring of one rank is the kernel
    return layer


register(Entry("yunchang-async", "other", attention, "yunchang", gpus_only=True))
