"""A plan: everything that is chosen for one layer on some ranks, from which a method builds its schedule."""

from __future__ import annotations

from dataclasses import dataclass

from hcms.schedule.cut import Cut
from hcms.schedule.schedule import First


@dataclass(frozen=True, slots=True)
class Plan:
    """What is chosen for a layer.

    Args:
        method: a name of the table of methods.
        cut: heads of each chunk, of a rank's M heads.
        prefetch: chunks exchanged ahead of the one attended to; None is all of them.
        first: once a chunk is attended to, what goes onto the communication lane first: the next chunk's `exchange`,
            or this chunk's `return`.
    """

    method: str
    cut: Cut
    prefetch: int | None = None
    first: First = "exchange"
