"""diffusers' Ulysses: its templated attention, as `enable_parallelism` gives it to every diffusers model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hcms_lab.measure.peers import Entry, register

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention


def attention(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """diffusers' attention with `ulysses_degree` = P over `group`."""
    return dispatched(kernel.diffusers_backend, group, ring=False)


def dispatched(backend: str, group: dist.ProcessGroup, *, ring: bool) -> Attention:
    """diffusers' attention dispatcher with a parallel configuration, as `enable_parallelism` gives it to a model.

    Raises:
        ValueError: this diffusers has no context parallelism for that backend.
    """
    import torch.distributed as dist
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
        dispatch_attention_fn,
    )
    from torch.distributed.device_mesh import DeviceMesh

    name = AttentionBackendName(backend)
    if not _AttentionBackendRegistry._is_context_parallel_available(name):
        raise ValueError(f"diffusers' attention backend {backend!r} has no context parallelism")
    ranks = dist.get_world_size(group)
    context = ContextParallelConfig(ring_degree=ranks) if ring else ContextParallelConfig(ulysses_degree=ranks)
    # What its `setup` does with a mesh over new groups, over the given group instead.
    mesh = DeviceMesh.from_group(group, "cuda" if dist.get_backend(group) == "nccl" else "cpu")
    if ring:
        context._ring_mesh, context._ring_local_rank = mesh, dist.get_rank(group)
    else:
        context._ulysses_mesh, context._ulysses_local_rank = mesh, dist.get_rank(group)
    config = ParallelConfig(context_parallel_config=context)

    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return dispatch_attention_fn(q_BLNH, k_BLNH, v_BLNH, backend=name, parallel_config=config)

    return attend


register(Entry("diffusers-ulysses", "ulysses", attention, "diffusers"))
