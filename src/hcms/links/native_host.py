"""A card each, and the host's memory between them: what NCCL does between GPUs that cannot reach each other.

The same cards as over their own link, in the regime that the paper measured.
"""

from __future__ import annotations

from hcms.links import Link
from hcms.links.native import start

P2P_DISABLE = "NCCL_P2P_DISABLE"

LINK = Link(
    "native-host",
    "a card each, NCCL through the host's memory",
    ("cuda",),
    "each",
    start,
    environment={P2P_DISABLE: "1"},
)
