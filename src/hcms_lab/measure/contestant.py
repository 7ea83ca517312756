"""Who runs in a benchmark: one of our methods, or a peer's, behind the same few calls."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.kernels import Kernel
from hcms.methods import METHODS
from hcms.schedule.cut import Shape, format_cut
from hcms.schedule.profile import Profile
from hcms.schedule.schedule import COMPUTE_2, Schedule
from hcms.schedule.timeline import Timeline
from hcms.transport import COLLECTIVE
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
    def eager(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        """The same without a graph, keeping its timeline where there is one."""
        ...

    def poison(self) -> None: ...


class OurMethod:
    """A case of our own. With `graph="off"` every call keeps its timeline, else `eager` ones do."""

    def __init__(
        self,
        case: Case,
        kernel: str,
        group: dist.ProcessGroup | None,
        profile: Profile | None,
        graph: str,
        transport: str,
    ) -> None:
        self._case, self._kernel_name = case, kernel
        self._kernel_runs: str | None = None
        self._attention = SequenceParallelAttention(
            group,
            case.method,
            case.cut or "auto",
            kernel,
            prefetch=case.prefetch,
            first=case.first,  # pyright: ignore[reportArgumentType]
            profile=profile,
            transport=COLLECTIVE if METHODS[case.method].program == "ring" else transport,
            graph=graph,  # pyright: ignore[reportArgumentType]
            record_timeline=graph == "off",
        )
        self.version: str | None = None

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return self._attention(q_BLNH, k_BLNH, v_BLNH)

    def eager(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        attention = self._attention
        asked, attention.record_timeline = attention.record_timeline, True
        try:
            return attention(q_BLNH, k_BLNH, v_BLNH)
        finally:
            attention.record_timeline = asked
            self._kernel_runs = attention.kernel.runs(q_BLNH, k_BLNH, v_BLNH)

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
        return path_of(self._attention, self._kernel_runs)

    @property
    def cut(self) -> str | None:
        return cut_of(self._attention)

    @property
    def schedule(self) -> Schedule | None:
        return self._attention.schedule

    @property
    def plan_reason(self) -> str | None:
        return self._attention.plan_reason

    @property
    def buffer_bytes(self) -> int:
        return self._attention.buffer_bytes


def path_of(attention: SequenceParallelAttention, kernel_runs: str | None = None) -> str:
    """What the last call was: from what ran, not from what was asked for."""
    schedule = attention.schedule
    if schedule is None:
        return "nothing ran"
    overlap = "overlapped" if schedule.overlaps else "serial"
    ran = kernel_runs or attention.kernel.name
    by = dist.get_backend(attention.group) if attention.transport == COLLECTIVE else attention.transport
    path = f"{schedule.name}/{format_cut(schedule.cut)}/{ran}/{by}/{overlap}"
    return path if attention.graph == "off" else f"{path}/{attention.path}"


def cut_of(attention: SequenceParallelAttention) -> str | None:
    """The last call's cut, with what is done at its ends, as configurations write it; None of a ring."""
    schedule = attention.schedule
    if schedule is None or schedule.name == "ring":
        return None
    ends = (schedule.parts[0], schedule.parts[-1])
    return str(Shape(schedule.cut, ends, COMPUTE_2 in schedule.lanes, schedule.comm_sms))


class AttentionAlone:
    """The ceiling on a GPU: the kernel on all tokens of a rank's heads, in blocks of its own calls like everyone.

    It takes `q_BSMH`, `k_BSMH`, `v_BSMH`, made once by the benchmark, in place of a rank's shards.
    """

    timeline: Timeline | None = None
    schedule: Schedule | None = None
    cut: str | None = None
    plan_reason: str | None = None
    version: str | None = None
    buffer_bytes = 0

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.requested_path = f"ceiling/{kernel.name}"
        self.actual_path = "nothing ran"

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        return self._kernel.attend(q_BLNH, k_BLNH, v_BLNH)

    def eager(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        self.actual_path = f"attention alone/{self._kernel.runs(q_BLNH, k_BLNH, v_BLNH)}"
        return self(q_BLNH, k_BLNH, v_BLNH)

    def poison(self) -> None:
        """Nothing: the kernel owns no buffer."""


def contestant(
    case: Case,
    kernel: str,
    group: dist.ProcessGroup | None,
    profile: Profile | None,
    *,
    graph: str = "off",
    transport: str = COLLECTIVE,
) -> Contestant:
    """The contestant of a case.

    Raises:
        ImportError, ValueError, RuntimeError: it cannot take part; the message says why.
    """
    if case.method.startswith(PEER):
        from hcms_lab.measure.peers import peer

        return peer(case.method.removeprefix(PEER), kernel, group)
    return OurMethod(case, kernel, group, profile, graph, transport)
