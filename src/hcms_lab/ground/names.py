"""Names that one room writes and another reads, for readers that do not wait for torch."""

from __future__ import annotations

from typing import Literal

# The kernels of hcms.kernels, in its order.
KERNELS = ("sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "math", "flash-attn", "flash-attn-3", "sage")

PEER = "peer:"  # a method of this prefix is a peer library's

# `ulysses` overlaps nothing: Table 5's speeds are over the fastest of these. `other` is neither that nor a ring.
PeerKind = Literal["ulysses", "ring", "other"]


def peer_kind_by_name(method: str) -> PeerKind | None:
    """What a peer is, for records of before they said so; None of a method of ours."""
    if not method.startswith(PEER):
        return None
    if method.endswith("-ulysses"):
        return "ulysses"
    return "ring" if "ring" in method or "context-parallel" in method else "other"
