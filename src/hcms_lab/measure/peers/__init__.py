"""Peer libraries in the benchmark: one thin adapter a file, imported only when its peer is asked for.

An adapter's module has a function `attention(kernel, group)` that gives the peer's own attention as a callable
`(q_BLNH, k_BLNH, v_BLNH) -> out_BLNH`, on the same tensors, group and kernel as everyone else. None holds peer code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that a configuration's peers can be checked without torch
    import torch.distributed as dist

    from hcms_lab.measure.peers.adapter import Peer


@dataclass(frozen=True)
class Entry:
    """Where a peer is found.

    Args:
        module: the adapter, in this package.
        distribution: whose version is recorded.
        package: what it is imported as, where that is another name.
        gpus_only: it has no path without CUDA and NCCL.
        options: keyword arguments of the adapter's `attention`.
    """

    module: str
    distribution: str
    package: str = ""
    gpus_only: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "package", self.package or self.distribution)


PEERS: dict[str, Entry] = {
    "diffusers-ulysses": Entry("diffusers_ulysses", "diffusers"),
    "diffusers-ring": Entry("diffusers_ring", "diffusers", gpus_only=True),
    "deepspeed-ulysses": Entry("deepspeed_ulysses", "deepspeed"),
    "torch-context-parallel": Entry("torch_context_parallel", "torch", options={"rotate": "allgather"}),
    "torch-context-parallel-alltoall": Entry("torch_context_parallel", "torch", options={"rotate": "alltoall"}),
    "yunchang-ulysses": Entry("yunchang_ulysses", "yunchang"),
    "yunchang-async": Entry("yunchang_async", "yunchang", gpus_only=True),
    "yunchang-hybrid": Entry("yunchang_hybrid", "yunchang", gpus_only=True),
    "flashinfer-ulysses": Entry("flashinfer_ulysses", "flashinfer-python", "flashinfer", gpus_only=True),
    "flashinfer-chunks": Entry("flashinfer_chunks", "flashinfer-python", "flashinfer", gpus_only=True),
}


def peer(name: str, kernel: str, group: dist.ProcessGroup | None) -> Peer:
    """A peer as a contestant. Collective where the peer makes groups of its own.

    Args:
        name: one of `PEERS`.
        kernel: as `hcms.kernels` names it; each adapter gives it to its peer, or names the peer's equal.
        group: the ranks; None is the default group.

    Raises:
        ValueError: no such peer, or one that cannot run on this group or with this kernel.
        ImportError: its package is not installed.
    """
    import torch.distributed as dist

    from hcms.kernels import kernel as kernel_named
    from hcms_lab.measure.peers.adapter import Peer

    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}: choose one of {', '.join(PEERS)}")
    entry = PEERS[name]
    if find_spec(entry.package) is None:
        raise ImportError(f"{name} needs {entry.distribution}, not installed here: pip install {entry.distribution}")
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    if entry.gpus_only and dist.get_backend(group) != "nccl":
        raise ValueError(f"{name} runs on GPUs over NCCL only; this group is {dist.get_backend(group)!r}")
    attention = import_module(f"{__name__}.{entry.module}").attention
    make = partial(attention, kernel_named(kernel), group, **entry.options)
    return Peer(name, kernel, group, make(), version(entry.distribution))
