"""One noise for all ranks: what is split must be one tensor, and users may not seed."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch.distributed as dist
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from hcms.diffusers.attach import STATE

_SHARED = "_hcms_shared"  # marks a step whose result is shared already, by whomever it is wrapped


def share_noise(pipe: DiffusionPipeline, group: dist.ProcessGroup) -> None:
    """Make every rank start from rank 0's latents and take rank 0's result of each of a scheduler's steps.

    A stochastic scheduler draws from a generator, from torch's global one, or from one of its own: whichever, its
    result is shared. A deterministic one's is equal already; latents are small beside what a step exchanges.
    """
    undo: list[Callable[[], None]] = []
    pipe.__dict__[STATE] = undo
    _share_steps(pipe, group, undo)
    prepare = getattr(pipe, "prepare_latents", None)
    if prepare is None:
        return

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        _share_steps(pipe, group, undo)  # users set schedulers at any time
        made = prepare(*args, **kwargs)
        if isinstance(made, tuple):
            return tuple(_first_rank_s(x, group) if isinstance(x, Tensor) else x for x in made)
        return _first_rank_s(made, group)

    pipe.__dict__["prepare_latents"] = prepare_latents
    undo.append(lambda: pipe.__dict__.pop("prepare_latents"))


def _share_steps(pipe: DiffusionPipeline, group: dist.ProcessGroup, undo: list[Callable[[], None]]) -> None:
    for scheduler in vars(pipe).values():
        if isinstance(scheduler, SchedulerMixin) and not hasattr(scheduler.__dict__.get("step"), _SHARED):
            _share_steps_of(scheduler, group, undo)


def _share_steps_of(scheduler: Any, group: dist.ProcessGroup, undo: list[Callable[[], None]]) -> None:
    before = scheduler.__dict__.get("step")  # of someone else who changed this object's

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Looked up on the scheduler that is called: pipelines copy theirs, and a copy must not step the original.
        made = before(*args, **kwargs) if before is not None else type(self).step(self, *args, **kwargs)
        if isinstance(made, tuple):
            return (_first_rank_s(made[0], group), *made[1:])
        made.prev_sample = _first_rank_s(made.prev_sample, group)
        return made

    def restore() -> None:
        if before is not None:
            scheduler.__dict__["step"] = before
        else:
            scheduler.__dict__.pop("step", None)

    setattr(step, _SHARED, True)
    scheduler.__dict__["step"] = MethodType(step, scheduler)
    undo.append(restore)


def _first_rank_s(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rank 0's tensor on every rank; the given one stays as it is, as it may be the user's."""
    tensor = tensor.contiguous()
    shared = tensor if dist.get_rank(group) == 0 else tensor.clone()
    dist.broadcast(shared, group=group, group_src=0)
    return shared
