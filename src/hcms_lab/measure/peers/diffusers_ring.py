"""diffusers' ring: K and V gathered once, attended to rank by rank and merged by log-sum-exp.

Its default backend gives no log-sum-exp and its flash backend has no CPU path, so it needs a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hcms_lab.measure.peers import Entry, register
from hcms_lab.measure.peers.diffusers_ulysses import dispatched

if TYPE_CHECKING:
    import torch.distributed as dist

    from hcms.kernels import Kernel
    from hcms_lab.measure.peer_contestant import Attention


def attention(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """diffusers' attention with `ring_degree` = P over `group`; plain "sdpa" is its flash backend here."""
    backend = "_native_flash" if kernel.name == "sdpa" else kernel.diffusers_backend
    return dispatched(backend, group, ring=True)


register(Entry("diffusers-ring", "ring", attention, "diffusers", gpus_only=True))
