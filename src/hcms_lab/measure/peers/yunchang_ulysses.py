"""yunchang's (long-context-attention's) Ulysses: three exchanges and a return around the run's kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hcms_lab.measure.peers import Entry, register

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention


def attention(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """`UlyssesAttention` over `group`.

    Its kernel slot gets the run's kernel: those of its own list need CUDA, and all contestants shall share one.
    """
    from yunchang.kernels import AttnType
    from yunchang.ulysses import UlyssesAttention

    ulysses = UlyssesAttention(group, attn_type=AttnType.TORCH_EFFICIENT)
    ulysses.attn_fn = only_qkv(kernel)
    return ulysses


def only_qkv(kernel: Kernel) -> Any:
    """The kernel behind yunchang's signature: masks, dropout and the like are at their defaults here."""

    def attend(q_BSmH: Tensor, k_BSmH: Tensor, v_BSmH: Tensor, **_defaults: Any) -> Tensor:
        return kernel.attend(q_BSmH, k_BSmH, v_BSmH)

    return attend


register(Entry("yunchang-ulysses", "ulysses", attention, "yunchang"))
