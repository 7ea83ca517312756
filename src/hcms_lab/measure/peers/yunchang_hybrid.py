"""yunchang's hybrid: rings of two ranks, Ulysses across them. Needs a GPU, for its ring's kernels, and four ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hcms_lab.measure.peers import Entry, register

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention

RING = 2  # ranks a ring
_KERNELS = {"sdpa": "torch_flash", "sdpa-flash": "torch_flash", "flash-attn": "fa", "flash-attn-3": "fa3"}


def attention(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """`LongContextAttention` with rings of two ranks and Ulysses across P/2. Collective.

    Raises:
        ValueError: fewer than four ranks, an odd number of them, or a kernel that its ring does not have.
    """
    import torch.distributed as dist
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    ranks = dist.get_world_size(group)
    if ranks < 4 or ranks % RING:
        raise ValueError(f"yunchang-hybrid needs an even number of at least 4 ranks, got {ranks}")
    if kernel.name not in _KERNELS:
        raise ValueError(f"yunchang's ring takes {', '.join(_KERNELS)}, not kernel {kernel.name!r}")
    set_seq_parallel_pg(ranks // RING, RING, dist.get_rank(group), ranks)
    layer: Any = LongContextAttention(attn_type=AttnType.from_string(_KERNELS[kernel.name]))

    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return layer(q_BLNH, k_BLNH, v_BLNH, causal=False)

    return attend


register(Entry("yunchang-hybrid", "other", attention, "yunchang", gpus_only=True))
