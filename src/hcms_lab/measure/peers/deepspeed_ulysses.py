"""DeepSpeed's Ulysses: `DistributedAttention` around the run's kernel, three exchanges and a return."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hcms_lab.measure.peers import Entry, register

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention


def attention(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """DeepSpeed's distributed attention over `group`, batch first."""
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist
    from deepspeed.sequence.layer import DistributedAttention

    # Its shared-memory all-reduce is compiled on first use; attention never uses it, and it needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Wraps the process group that there is; without it deepspeed.comm has no backend.
    deepspeed.init_distributed(str(dist.get_backend(group)), auto_mpi_discovery=False, verbose=False)
    # Called as a function, not as a module: a kernel here has no parameters.
    distributed = DistributedAttention(kernel.attend, group, scatter_idx=2, gather_idx=1)  # pyright: ignore[reportArgumentType]

    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return distributed(q_BLNH, k_BLNH, v_BLNH, 0)

    return attend


register(Entry("deepspeed-ulysses", "ulysses", attention, "deepspeed"))
