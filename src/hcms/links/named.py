"""A process group written in Python: it keeps its own names, by which functional collectives look groups up."""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

import torch.distributed as dist


class NamedGroup(dist.ProcessGroup):
    """A group of `backend`; what derives from it carries the collectives."""

    def __init__(self, backend: str, rank: int, size: int) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self._backend, self._name, self._desc = backend, "", ""

    def getBackendName(self) -> str:
        return self._backend

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    def setGroupDesc(self, desc: str) -> None:
        self._desc = desc

    def getGroupDesc(self) -> str:
        return self._desc
