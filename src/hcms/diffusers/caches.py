"""diffusers' caches that skip layers: ranks must skip the same ones, or those that do not wait for the others forever.

Most decide by counting steps (PyramidAttentionBroadcast, TaylorSeer, FasterCache, MagCache with given ratios), which is
the same on every rank. FirstBlockCache looks at tokens: here it looks at those of all ranks. The rest are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.hooks.mag_cache import MagCacheHeadHook
from diffusers.hooks.sea_cache import SeaCacheRootHook
from torch import Tensor, nn

_DECIDE = "_should_compute_remaining_blocks"


def settle(model: str, modules: Iterable[nn.Module], group: dist.ProcessGroup, agreeing: list[Any]) -> None:
    """Make caches on a model's modules decide for all ranks alike; those that now do are added to `agreeing`.

    Raises:
        ValueError: a cache on it cannot.
    """
    for hook in _hooks(modules):
        if isinstance(hook, FBCHeadBlockHook) and hook not in agreeing:
            hook.__dict__[_DECIDE] = partial(_first_block_changed, hook, group)
            agreeing.append(hook)
        refused = None
        if isinstance(hook, SeaCacheRootHook):
            refused = "SeaCache decides on each rank by itself what to skip"
        elif isinstance(hook, MagCacheHeadHook) and hook.config.calibrate:
            refused = "MagCache would calibrate on a part of the tokens: calibrate on one process"
        if refused is not None:
            raise ValueError(
                f"{model} cannot run in parallel with this cache: {refused}; call disable_cache() or hcms.restore()"
            )


def unsettle(agreeing: list[Any]) -> None:
    """Give back their own decision to the hooks that `settle` changed."""
    for hook in agreeing:
        hook.__dict__.pop(_DECIDE, None)
    agreeing.clear()


def skipping(modules: Iterable[nn.Module]) -> bool:
    """Whether a cache may skip all attention of a run."""
    return any(hook._is_stateful for hook in _hooks(modules))


def _hooks(modules: Iterable[nn.Module]) -> Iterator[Any]:
    for module in modules:
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None:
            yield from registry.hooks.values()


@torch.compiler.disable(reason="hcms makes ranks agree on what FirstBlockCache skips")
def _first_block_changed(hook: FBCHeadBlockHook, group: dist.ProcessGroup, residual_BLD: Tensor) -> bool:
    """What FirstBlockCache asks of the first block's residual, asked of all ranks' tokens. Collective."""
    last_BLD = hook.state_manager.get_state().head_block_residual  # pyright: ignore[reportAttributeAccessIssue]
    if last_BLD is None:
        return True
    # Every rank holds as many tokens, so a mean over ranks is that over tokens; a ratio needs only the sums.
    own = torch.stack([(residual_BLD - last_BLD).abs().mean(), last_BLD.abs().mean()]).float()
    # Gathered and added in one order everywhere: a reduction's result need not have the same bits on all ranks.
    by_rank = own.new_empty(2 * dist.get_world_size(group))
    dist.all_gather_into_tensor(by_rank, own, group=group)
    change, scale = by_rank.view(-1, 2).sum(dim=0)
    return (change / scale).item() > hook.threshold
