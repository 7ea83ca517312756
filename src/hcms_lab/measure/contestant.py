"""Who runs in a benchmark: one of our methods, or a peer's, behind the same few calls."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.schedule.cut import format_cut
from hcms.schedule.profile import Profile
from hcms.schedule.schedule import Schedule
from hcms.schedule.timeline import Timeline
from hcms_lab.ground.names import PEER
from hcms_lab.measure.cases import Case


class Contestant(Protocol):
    """A method under test. `__call__` is what is timed; everything else happens outside the clock."""

    @property
    def timeline(self) -> Timeline | None: ...
    @property
    def requested_path(self) -> str: ...
    @property
    def actual_path(self) -> str: ...
    @property
    def cut(self) -> str | None: ...
    @property
    def schedule(self) -> Schedule | None: ...
    @property
    def plan_reason(self) -> str | None: ...
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def version(self) -> str | None: ...

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor: ...
    def poison(self) -> None: ...


class OurMethod:
    """A case of our own, recorded as it runs."""

    def __init__(self, case: Case, kernel: str, group: dist.ProcessGroup | None, profile: Profile | None) -> None:
        self._case, self._kernel_name = case, kernel
        self._attention = SequenceParallelAttention(
            group,
            case.method,
            case.cut or "auto",
            kernel,
            prefetch=case.prefetch,
            first=case.first,  # pyright: ignore[reportArgumentType]
            profile=profile,
            record_timeline=True,
        )
        self.version: str | None = None

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return self._attention(q_BLNH, k_BLNH, v_BLNH)

    def poison(self) -> None:
        self._attention.poison()

    @property
    def timeline(self) -> Timeline | None:
        return self._attention.timeline

    @property
    def requested_path(self) -> str:
        return "/".join(x for x in (self._case.method, self._case.cut, self._kernel_name) if x)

    @property
    def actual_path(self) -> str:
        """From what ran, not from what was asked for."""
        schedule = self._attention.schedule
        if schedule is None:
            return "nothing ran"
        overlap = "overlapped" if schedule.overlaps else "serial"
        backend = dist.get_backend(self._attention.group)
        return f"{schedule.name}/{format_cut(schedule.cut)}/{self._attention.kernel.name}/{backend}/{overlap}"

    @property
    def cut(self) -> str | None:
        schedule = self._attention.schedule
        return format_cut(schedule.cut) if schedule is not None and schedule.name != "ring" else None

    @property
    def schedule(self) -> Schedule | None:
        return self._attention.schedule

    @property
    def plan_reason(self) -> str | None:
        return self._attention.plan_reason

    @property
    def buffer_bytes(self) -> int:
        return self._attention.buffer_bytes


def contestant(case: Case, kernel: str, group: dist.ProcessGroup | None, profile: Profile | None) -> Contestant:
    """The contestant of a case.

    Raises:
        ImportError, ValueError, RuntimeError: it cannot take part; the message says why.
    """
    if case.method.startswith(PEER):
        from hcms_lab.measure.peers import peer

        return peer(case.method.removeprefix(PEER), kernel, group)
    return OurMethod(case, kernel, group, profile)
