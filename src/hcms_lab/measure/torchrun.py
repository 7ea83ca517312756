"""What torchrun says of the ranks that it started; this process is one of them. Imports no torch."""

from __future__ import annotations

import os


def started_ranks() -> int | None:
    """How many ranks there are on all hosts; None where torchrun started none."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= set(os.environ) else None


def ranks_here() -> int:
    """How many of them are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", started_ranks() or 0))
