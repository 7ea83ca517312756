"""What a model must have, and is refused by name without."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from diffusers.hooks.context_parallel import _get_submodule_by_name
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from hcms.clip import Strides

_EXPERTS = ("transformer", "transformer_2")


def transformers_of(pipe_or_transformer: Any) -> list[nn.Module]:
    """A pipeline's transformers, or the one given; not torch.compile's wrapper, whose own hooks are not compiled away.

    Raises:
        ValueError: there are none.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        return [unwrap_module(pipe_or_transformer)]
    models = [
        unwrap_module(m) for name in _EXPERTS if isinstance(m := getattr(pipe_or_transformer, name, None), nn.Module)
    ]
    if not models:
        raise ValueError(
            f"{type(pipe_or_transformer).__name__} cannot be made parallel: it has no {' or '.join(_EXPERTS)} "
            f"(give a diffusers pipeline or its transformer)"
        )
    return models


def attention_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module with a diffusers attention processor, by name."""
    for name, module in model.named_modules():
        if getattr(module, "processor", None) is not None:
            yield name, module


def plan_of(model: nn.Module) -> dict[str, Any]:
    """Where a model's tokens are split and gathered, by submodule."""
    plan = getattr(model, "_cp_plan", None)
    assert isinstance(plan, dict)
    return plan


def submodules(model: nn.Module, module_id: str) -> list[nn.Module]:
    """The modules that a name in a plan stands for; `blocks.*` is all of them."""
    found = _get_submodule_by_name(model, module_id)
    return found if isinstance(found, list) else [found]


def refuse_misfit(model: nn.Module) -> None:
    """Raise ValueError with the model's name and what it lacks, if `parallelize` does not fit it."""
    name = type(model).__name__
    if not isinstance(getattr(model, "_cp_plan", None), dict):
        raise ValueError(f"{name} cannot be made parallel: it has no _cp_plan, which says where its tokens are split")
    attentions = list(attention_modules(model))
    if not attentions:
        raise ValueError(f"{name} cannot be made parallel: it has no attention module with a diffusers processor")
    for at, module in attentions:
        processor = module.processor
        if not hasattr(processor, "_parallel_config") or not hasattr(processor, "_attention_backend"):
            raise ValueError(
                f"{name} cannot be made parallel: {type(processor).__name__} (at {at}) does not mark which attention "
                f"takes part, as diffusers' own processors do by _parallel_config"
            )
        if not hasattr(module, "heads"):
            raise ValueError(
                f"{name} cannot be made parallel: {type(module).__name__} (at {at}) has no number of heads"
            )
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(f"{name} cannot be made parallel: diffusers' enable_parallelism() was called on it already")
    for module_id, entry in plan_of(model).items():
        try:
            modules = submodules(model, module_id)
        except ValueError as error:
            raise ValueError(f"{name} cannot be made parallel: its _cp_plan names {module_id!r}: {error}") from None
        inputs = [k for k in entry if isinstance(k, str)] if isinstance(entry, dict) else []
        for module in modules:
            known = inspect.signature(type(module).forward).parameters
            if missing := [k for k in inputs if k not in known]:
                raise ValueError(f"{name} cannot be made parallel: {type(module).__name__} takes no {missing[0]!r}")


def strides_of(pipe_or_transformer: Any) -> Strides | None:
    """The pixels and frames a token covers, where a pipeline with a video VAE tells."""
    vae = getattr(getattr(pipe_or_transformer, "vae", None), "config", None)
    config = transformers_of(pipe_or_transformer)[0].config
    patch = getattr(config, "patch_size", None)
    temporal, spatial = getattr(vae, "scale_factor_temporal", None), getattr(vae, "scale_factor_spatial", None)
    if temporal is None or spatial is None or not isinstance(patch, list | tuple) or len(patch) != 3:
        return None
    return Strides(temporal, spatial, (patch[0], patch[1], patch[2]))
