"""What carries a chunk from rank to rank.

A transport is one file here that holds a `TRANSPORT`; nothing else lists transports.
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from hcms.schedule.schedule import Schedule
    from hcms.transport.layout import HeadExchange, LayerShape


class Make(Protocol):
    """Make the exchanges of one layer shape over one schedule. Collective. Arguments as of `HeadExchange`."""

    def __call__(
        self,
        group: dist.ProcessGroup,
        schedule: Schedule,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        heads_first: bool = False,
        own_apart: bool = False,
    ) -> HeadExchange: ...


@dataclass(frozen=True)
class Transport:
    """A transport by name.

    Args:
        name: as settings and records name it.
        summary: how it carries, in a line.
        devices: device types whose tensors it carries.
        collectives: whether the group's backend carries the bytes, so that each lane needs a communicator; otherwise a
            group of any backend will do, and a ring, which is made of sends and receives, cannot go by it.
        make: what makes its exchanges.
    """

    name: str
    summary: str
    devices: tuple[str, ...]
    collectives: bool
    make: Make


COLLECTIVE = "collective"


@cache
def transports() -> dict[str, Transport]:
    """Every transport by its name. Imports torch."""
    modules = (import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    made: list[Transport] = [module.TRANSPORT for module in modules if hasattr(module, "TRANSPORT")]
    return {transport.name: transport for transport in made}


def transport(name: str) -> Transport:
    """The transport of that name.

    Raises:
        ValueError: no such transport; the message lists those that there are.
    """
    if name not in transports():
        raise ValueError(f"unknown transport {name!r}: choose one of {', '.join(transports())}")
    return transports()[name]
