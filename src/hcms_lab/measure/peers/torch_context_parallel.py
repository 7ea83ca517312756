"""PyTorch's ring: the function that `context_parallel` dispatches scaled dot product attention to.

Called directly, for two reasons. The context manager shards its inputs by itself, and here they are sharded already;
and its dispatch knows the CUDA operations only: on CPU it gathers K and V whole, with no ring.

`allgather`, torch's default, gathers all K and V during the first step; `alltoall` passes them on step by step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from hcms_lab.measure.peers import Entry, register

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention

_BACKENDS = {"sdpa-flash": "FLASH_ATTENTION", "sdpa-efficient": "EFFICIENT_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION"}


def attention(kernel: Kernel, group: dist.ProcessGroup, *, rotate: Literal["allgather", "alltoall"]) -> Attention:
    """Ring attention over `group`, K and V passed on by `rotate`.

    Raises:
        ValueError: a kernel that torch's context parallelism has no ring for.
    """
    if kernel.name not in ("sdpa", *_BACKENDS):
        raise ValueError(f"torch's context parallelism takes sdpa and its backends, not kernel {kernel.name!r}")
    from torch.distributed.tensor.experimental import _attention as cp

    # The balance of causal masks; without a mask, torch refuses it.
    cp._cp_options.enable_load_balance = False

    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        cp.set_rotate_method(rotate)  # one setting for the process, and two peers that differ in it
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        op, options = _operation(kernel.name, q, k, v)
        out_BNLH = cp._templated_ring_attention(group, 2, op, q, k, v, **options)[0]
        return out_BNLH.transpose(1, 2)

    return attend


def _operation(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, dict[str, Any]]:
    """The operation behind the kernel's name; for plain sdpa, the one that sdpa itself would choose."""
    import torch
    from torch.nn.attention import SDPBackend

    aten = torch.ops.aten
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu, {}
    name = _BACKENDS.get(kernel) or SDPBackend(torch._fused_sdp_choice(q, k, v)).name
    with_lse = {"attn_bias": None, "compute_log_sumexp": True}
    return {
        "FLASH_ATTENTION": (aten._scaled_dot_product_flash_attention, {}),
        "EFFICIENT_ATTENTION": (aten._scaled_dot_product_efficient_attention, with_lse),
        "CUDNN_ATTENTION": (aten._scaled_dot_product_cudnn_attention, with_lse),
    }[name]


for _name, _rotate in (("torch-context-parallel", "allgather"), ("torch-context-parallel-alltoall", "alltoall")):
    register(Entry(_name, "ring", attention, "torch", mixes=True, options={"rotate": _rotate}))
