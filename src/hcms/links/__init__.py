"""What carries exchanges: the real link, or one that stands in where there is none.

A link is one file here that holds a `LINK`; nothing else lists links. Each makes a c10d group, so that methods and
peers run over it unchanged. What stands in says so: records name their link, and no column mixes two.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    Start = Callable[[int, int, torch.device, timedelta, dist.Store | None], dist.ProcessGroup]


@dataclass(frozen=True)
class Link:
    """A link by name.

    Args:
        name: as `link.kind` and records name it.
        summary: what of it is real and what is not, in a line.
        devices: device types that it connects.
        processes: `each` rank is one, or `one` process is one rank of P and stands for all.
        start: `(rank, ranks, device, timeout, store) -> control group`: makes the default process group, by the store
            or by what the environment says, and returns one for barriers and gathered results, never for what is
            measured.
        one_card: whether all ranks share one card, in place of a card each.
        environment: variables that ranks' processes must start with, where they are not set to something else.
    """

    name: str
    summary: str
    devices: tuple[str, ...]
    processes: Literal["each", "one"]
    start: Start
    one_card: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def one_for_all(self) -> bool:
        """Whether one process stands for all ranks."""
        return self.processes == "one"


def joining(rank: int, ranks: int, timeout: timedelta, store: dist.Store | None) -> dict[str, Any]:
    """What `init_process_group` is told of where the other ranks are."""
    if store is None:
        return {"timeout": timeout}
    return {"timeout": timeout, "store": store, "rank": rank, "world_size": ranks}


@cache
def links() -> dict[str, Link]:
    """Every link by its name. Imports torch."""
    modules = (import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    made: list[Link] = [module.LINK for module in modules if hasattr(module, "LINK")]
    return {link.name: link for link in made}
