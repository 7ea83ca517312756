"""Who holds which tokens: a model's `_cp_plan`, followed by diffusers' own hooks over a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Ranks:
    """What diffusers' hooks ask of their configuration and its mesh, answered by a process group."""

    ulysses_anything = ring_anything = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._flattened_mesh = self

    def size(self) -> int:
        return dist.get_world_size(self._group)

    def get_group(self) -> dist.ProcessGroup:
        return self._group


class _Split(ContextParallelSplitHook):
    """diffusers' hook, with a refusal in place of its assertion, and silent where a plan's entry does not apply."""

    def _prepare_cp_input(self, x: Tensor, cp_input: ContextParallelInput) -> Tensor:
        if cp_input.expected_dims is not None and x.dim() != cp_input.expected_dims:
            return x  # such as Wan's timestep, which only TI2V has a token
        tokens, ranks = x.shape[cp_input.split_dim], self.parallel_config._flattened_mesh.size()
        if tokens % ranks:
            below = tokens - tokens % ranks
            raise ValueError(
                f"{tokens} tokens cannot be divided among {ranks} ranks; {below} or {below + ranks} tokens could"
            )
        return super()._prepare_cp_input(x, cp_input)


def split(module: nn.Module, entry: dict[Any, Any], group: dist.ProcessGroup) -> list[RemovableHandle]:
    """Leave a module only this rank's tokens of those inputs or outputs that the plan's entry names."""
    hook = _Split(entry, _Ranks(group))  # pyright: ignore[reportArgumentType]
    hook.initialize_hook(module)
    outputs = [x for x in entry.values() if isinstance(x, ContextParallelInput) and x.split_output]
    handles = []
    if len(outputs) < len(entry):

        @torch.compiler.disable(reason="hcms splits tokens here")
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return hook.pre_forward(module, *args, **kwargs)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    if outputs:  # a whole model's output may be a dataclass, which diffusers' hook refuses
        handles.append(module.register_forward_hook(_after(hook, "hcms splits tokens here")))
    return handles


def gather(module: nn.Module, entry: Any, group: dist.ProcessGroup) -> list[RemovableHandle]:
    """Give a module's output all ranks' tokens. Collective when it runs."""
    outputs = [entry] if isinstance(entry, ContextParallelOutput) else list(entry)
    hook = ContextParallelGatherHook(outputs, _Ranks(group))  # pyright: ignore[reportArgumentType]
    return [module.register_forward_hook(_after(hook, "hcms gathers tokens here"))]


def _after(hook: Any, reason: str) -> Any:
    @torch.compiler.disable(reason=reason)
    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return hook.post_forward(module, output)

    return after
