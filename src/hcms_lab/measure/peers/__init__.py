"""Peer libraries in the benchmark: one thin adapter a file, which registers itself and holds no peer code.

An adapter gives the peer's own attention as a callable `(q_BLNH, k_BLNH, v_BLNH) -> out_BLNH`, on the same tensors,
group and kernel as everyone else. Modules of this package are imported where only names are asked for: they import
torch and their peer inside their functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from hcms_lab.ground.names import PeerKind

if TYPE_CHECKING:
    import torch.distributed as dist

    from hcms_lab.measure.peer_contestant import Attention, Peer


@dataclass(frozen=True)
class Entry:
    """A peer.

    Args:
        name: as configurations and records name it, after `peer:`.
        kind: what it is, as Table 5 compares it.
        attention: `(kernel, group, **options) -> Attention`. Collective where the peer makes groups of its own.
        distribution: whose version is recorded.
        package: what it is imported as, where that is another name.
        gpus_only: it has no path without CUDA and NCCL.
        mixes: it lays K and V out anew before it sends them, so that a ghost cannot tell what its peers would send.
        options: keyword arguments of `attention`.
    """

    name: str
    kind: PeerKind
    attention: Callable[..., Attention]
    distribution: str
    package: str = ""
    gpus_only: bool = False
    mixes: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "package", self.package or self.distribution)


PEERS: dict[str, Entry] = {}


def register(entry: Entry) -> None:
    """Add a peer.

    Raises:
        ValueError: the name is taken by another peer.
    """
    if PEERS.setdefault(entry.name, entry) != entry:
        raise ValueError(f"a peer named {entry.name!r} is registered already")


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
    from hcms.links import ghost
    from hcms_lab.measure.peer_contestant import Peer

    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}: choose one of {', '.join(PEERS)}")
    entry = PEERS[name]
    if find_spec(entry.package) is None:
        raise ImportError(f"{name} needs {entry.distribution}, not installed here: pip install {entry.distribution}")
    group = group if group is not None else dist.group.WORLD
    assert group is not None
    if entry.gpus_only and dist.get_backend(group) != "nccl":
        raise ValueError(f"{name} runs on GPUs over NCCL only; this group is {dist.get_backend(group)!r}")
    if entry.mixes and dist.get_backend(group) == ghost.NAME:
        raise ValueError(f"{name} sends K and V in a form of its own, which a ghost's peers cannot answer")
    attention = entry.attention(kernel_named(kernel), group, **entry.options)
    return Peer(name, kernel, group, attention, version(entry.distribution))


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
