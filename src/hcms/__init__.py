"""HCMS: sequence-parallel attention in the Ulysses way, with communication hidden behind computation.

Importing this package imports no torch: the schedules, the simulator and the adviser run without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SequenceParallelAttention", "__version__", "parallelize", "restore"]

if TYPE_CHECKING:
    from hcms.attention import SequenceParallelAttention
    from hcms.diffusers import parallelize, restore

_LAZY = {
    "SequenceParallelAttention": "hcms.attention",
    "parallelize": "hcms.diffusers",
    "restore": "hcms.diffusers",
}


def __getattr__(name: str) -> Any:
    """Import the parts that need torch only when they are asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hcms' has no attribute {name!r}")
