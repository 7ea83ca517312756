"""flashinfer's Ulysses communicator around the run's kernel: its NVLink exchange where the GPUs have one, else NCCL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hcms_lab.measure.peers import Entry, register

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention


def attention(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """Heads scattered, attended to and gathered by `UlyssesCommunicator`, made for the first call's size."""
    from flashinfer.comm import UlyssesCommunicator  # pyright: ignore[reportMissingImports]

    made: dict[tuple[torch.Size, torch.dtype], Any] = {}

    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        key = (q_BLNH.shape, q_BLNH.dtype)
        if key not in made:  # collective, at the first call of a size
            made[key] = UlyssesCommunicator(group, max_elems=q_BLNH.numel(), dtype=q_BLNH.dtype)
        communicator = made[key]
        q_BSMH, k_BSMH, v_BSMH = (communicator.scatter_heads(x.contiguous()) for x in (q_BLNH, k_BLNH, v_BLNH))
        return communicator.gather_heads(kernel.attend(q_BSMH, k_BSMH, v_BSMH).contiguous())

    return attend


register(Entry("flashinfer-ulysses", "ulysses", attention, "flashinfer-python", "flashinfer", gpus_only=True))
