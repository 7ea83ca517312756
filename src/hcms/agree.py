"""What all ranks of a group must have alike, made sure of before they exchange anything by it.

Ranks that disagree on a shape or a plan do not fail: they wait for each other, or read each other's bytes as something
else. So they say first what they have, once a shape; a warm call agrees on nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hcms.objects import everyones, firsts

T = TypeVar("T")


def agree(group: dist.ProcessGroup, value: Any, what: str) -> None:
    """Make sure that all ranks of the group have an equal `value`. Collective.

    Args:
        value: plain data: numbers, strings, tuples of them.
        what: what it is, for the message: `"shape"`.

    Raises:
        ValueError: on every rank, with the ranks that have each value.
    """
    values = everyones(value, group)
    if any(other != values[0] for other in values):
        found: dict[str, list[int]] = {}
        for rank, each in enumerate(values):
            found.setdefault(str(each), []).append(rank)
        by_value = "; ".join(f"{each} on {_named(ranks)}" for each, ranks in found.items())
        raise ValueError(f"ranks differ in {what}: {by_value}")


def together(group: dist.ProcessGroup, call: Callable[[], object]) -> None:
    """Do something on every rank; where it fails on one, it fails on all.

    Raises:
        RuntimeError: what the first rank that failed says.
    """
    problem = ""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        problem = str(error)
    for said in everyones(problem, group):
        if said:
            raise RuntimeError(said)


def given_by_first(group: dist.ProcessGroup, make: Callable[[], T]) -> T:
    """What `make()` returns on the group's first rank, on every rank; nobody else calls it. Collective.

    For what only one rank may be able to read, as a file on one host's disk.

    Raises:
        Exception: of `make`, on the first rank as it is, on the others as a ValueError with its message.
    """
    given: tuple[T | None, str | None] = (None, None)
    error: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            given = (make(), None)
        except Exception as caught:
            error, given = caught, (None, str(caught) or type(caught).__name__)
    made, why = firsts(given, group)
    if error is not None:
        raise error
    if why is not None:
        raise ValueError(why)
    return made  # pyright: ignore[reportReturnType]


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
