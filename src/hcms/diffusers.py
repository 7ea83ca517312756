"""`parallelize`: a diffusers pipeline on all ranks of a group, in one call; `restore` undoes it.

No model is rewritten. diffusers' models that fit (Wan 2.1, 2.2 and others) say two things themselves, and both are
used as they are: a `_cp_plan`, where tokens are split and gathered, which diffusers' own hooks follow; and, in each
attention processor, which attention takes part, by handing `parallel_config` to diffusers' dispatcher. While the model
runs, that dispatcher sends marked attention through one `SequenceParallelAttention` and leaves all other attention (to
text, to images) with the kernel that it had. Projections, norms and rotary embedding stay the model's own code.

diffusers' `enable_parallelism` is not called, as it asks for an accelerator and brings its own exchange.
"""

from __future__ import annotations

import atexit
import copy
import inspect
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.context_parallel import (
    ContextParallelGatherHook,
    ContextParallelSplitHook,
    _get_submodule_by_name,
)
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Dispatcher
from torch import Tensor, nn

from hcms.attention import SequenceParallelAttention
from hcms.clip import ClipShape, Strides, heads_refusal

T = TypeVar("T")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_STATE = "_hcms"  # on a transformer or pipeline: what `restore` needs
_HOOK = "hcms"
_EXPERTS = ("transformer", "transformer_2")


def parallelize(
    pipe_or_transformer: T,
    group: dist.ProcessGroup | None = None,
    method: str = "hcms",
    plan: str | int = "auto",
    kernel: str = "sdpa",
    *,
    attention: Attend | None = None,
) -> T:
    """Split a diffusers model's tokens over the ranks of a group, in place. Collective: all ranks call it.

    Every rank then calls the pipeline with the same arguments and gets the whole result. A pipeline's first noise is
    rank 0's, so an unseeded generator is fine. All experts of a pipeline (`transformer`, `transformer_2`) share one
    attention object, and so its streams, process groups and buffers.

    Args:
        pipe_or_transformer: a diffusers pipeline, or a transformer of one. A pipeline that shall run on CUDA is moved
            there after this call, or to the rank's own device before it.
        group: the ranks; None is the default group, which is made from torchrun's environment if there is none (NCCL
            where CUDA is, on device LOCAL_RANK; else Gloo).
        method, plan, kernel: see `SequenceParallelAttention`.
        attention: an attention object to use instead of a new one made of the three arguments above.

    Returns the same object.

    Raises:
        ValueError: a model that this does not fit, by name, with what is missing; heads that the ranks do not divide; a
            model that is parallel already; no group and no torchrun. When the model runs: tokens that the ranks do not
            divide, with the sizes that would do.
        RuntimeError: when the model runs: no attention took part, which would give a wrong picture.
    """
    models = _transformers(pipe_or_transformer)
    for model in models:
        if hasattr(model, _STATE):
            raise ValueError(f"this {type(model).__name__} is parallel already: call hcms.restore() on it first")
        _refuse_misfit(model)
    group = _group(group, models)
    ranks = dist.get_world_size(group)
    if method != "ring":
        for model in models:
            for name, module in _attention_modules(model):
                if refusal := heads_refusal(module.heads, ranks, f"{type(model).__name__} ({name})"):
                    raise ValueError(refusal)
    if attention is None:
        attention = SequenceParallelAttention(group, method, plan, kernel)
    strides = _strides(pipe_or_transformer)
    for model in models:
        attach(model, attention, group, strides=strides)
    if isinstance(pipe_or_transformer, DiffusionPipeline):
        _share_noise(pipe_or_transformer, group)
    return pipe_or_transformer


def restore(pipe_or_transformer: T) -> T:
    """Undo `parallelize`: hooks, processors and methods are again the objects that were there. Returns the same object.

    Raises:
        ValueError: it is not parallel.
    """
    undone = False
    targets: list[Any] = [*_transformers(pipe_or_transformer), pipe_or_transformer]
    for target in targets:
        undo = target.__dict__.pop(_STATE, None)
        if undo is not None:
            undone = True
            for step in reversed(undo):
                step()
    if not undone:
        raise ValueError(
            f"this {type(pipe_or_transformer).__name__} is not parallel: hcms.parallelize() was not called on it"
        )
    return pipe_or_transformer


def attach(
    model: nn.Module, attention: Attend, group: dist.ProcessGroup | None, *, strides: Strides | None = None
) -> None:
    """Send a transformer's marked attention through `attention`, and split its tokens over `group`; see `parallelize`.

    `group=None` splits nothing: then `attention` gets whole sequences, as when one device is timed. `strides` makes
    refusals speak of video frames and pixels.
    """
    undo: list[Callable[[], None]] = []
    object.__setattr__(model, _STATE, undo)  # past nn.Module, so that nothing is registered as a submodule
    touched = [model]
    if group is not None:
        touched += [m for module_id in _plan(model) for m in _submodules(model, module_id)]
    for module in dict.fromkeys(touched):
        undo.append(_untouched(module))
    if group is not None:
        ranks = _Ranks(group)
        for module_id, entry in _plan(model).items():
            for module in _submodules(model, module_id):
                hook = _split(entry, ranks) if isinstance(entry, dict) else _gather(entry, ranks)
                name = f"{_HOOK}---{'split' if isinstance(entry, dict) else 'gather'}---{module_id}"
                registry = HookRegistry.check_if_exists_or_initialize(module)
                registry.register_hook(hook, name)
                undo.append(partial(registry.remove_hook, name, recurse=False))
    route = _Route(attention, type(model).__name__)
    for _, module in _attention_modules(model):
        original = module.processor
        routed = copy.copy(original)
        routed._parallel_config = route
        routed._attention_backend = None
        route.own_backend = original._attention_backend
        module.processor = routed
        undo.append(lambda m=module, p=original: setattr(m, "processor", p))
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(_Run(route, strides, 1 if group is None else dist.get_world_size(group)), _HOOK)
    undo.append(partial(registry.remove_hook, _HOOK, recurse=False))
    undo.append(registry.invalidate_child_registries_cache)
    registry.invalidate_child_registries_cache()


class _Route:
    """Where marked attention goes while a model runs; to processors it is their `_parallel_config`, opaque to them."""

    def __init__(self, attention: Attend, model: str) -> None:
        self.attention = attention
        self.model = model
        self.own_backend: Any = None  # what the model's other attention is set to; None is the active one
        self.calls = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Be diffusers' active attention backend, as its own `attention_backend()` context makes another so."""
        outer = Dispatcher._active_backend
        Dispatcher.register(self)(self._dispatch(self.own_backend or outer))  # pyright: ignore[reportArgumentType]
        Dispatcher._active_backend = self  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            Dispatcher._active_backend = outer
            for table in (Dispatcher._backends, Dispatcher._constraints, Dispatcher._supported_arg_names):
                table.pop(self, None)

    def _dispatch(self, outer: Any) -> Callable[..., Tensor]:
        kernel = Dispatcher._backends[outer]
        takes = Dispatcher._supported_arg_names[outer]

        def dispatch(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
            _parallel_config: Any = None,
        ) -> Tensor:
            if _parallel_config is None:
                others = {
                    "attn_mask": attn_mask,
                    "dropout_p": dropout_p,
                    "is_causal": is_causal,
                    "scale": scale,
                    "enable_gqa": enable_gqa,
                }
                return kernel(query, key, value, **{k: v for k, v in others.items() if k in takes})
            for asked, what in (
                (attn_mask is not None, "an attention mask"),
                (is_causal, "causal attention"),
                (enable_gqa or key.shape[2] != query.shape[2], "grouped key and value heads"),
                (key.shape[1] != query.shape[1], "attention to a sequence of another length"),
                (dropout_p != 0.0, "dropout"),
                (scale is not None and not math.isclose(scale, query.shape[-1] ** -0.5), "its own softmax scale"),
            ):
                if asked:
                    raise ValueError(
                        f"{self.model} cannot be made parallel: its attention asks for {what}, which hcms does not "
                        f"support; call hcms.restore() on it"
                    )
            self.calls += 1
            return self.attention(query, key, value)

        return dispatch


class _Run(ModelHook):
    """Around a transformer's forward: refuse what would go wrong, activate the route, and see that it was taken."""

    def __init__(self, route: _Route, strides: Strides | None, ranks: int) -> None:
        super().__init__()
        self.route, self.strides, self.ranks = route, strides, ranks

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(args), None)
        if self.strides is not None and isinstance(hidden, Tensor) and hidden.ndim == 5:
            _, _, latent_frames, rows, columns = hidden.shape
            s = self.strides
            clip = ClipShape((latent_frames - 1) * s.temporal + 1, rows * s.spatial, columns * s.spatial, s)
            if refusal := clip.refusal(self.ranks):
                raise ValueError(refusal)
        before = self.route.calls
        with self.route.active():
            output = self.fn_ref.original_forward(*args, **kwargs)  # pyright: ignore[reportOptionalCall]
        if self.route.calls == before:
            raise RuntimeError(
                f"{type(module).__name__} ran without any attention going through hcms: its tokens were split, so the "
                f"result would be wrong; is a custom attention processor installed?"
            )
        return output


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

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not any(isinstance(entry, ContextParallelInput) and entry.split_output for entry in self.metadata.values()):
            return output  # only inputs are split; a whole model's output may be a dataclass, which the hook refuses
        return super().post_forward(module, output)

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


def _split(entry: dict[Any, Any], ranks: Any) -> ContextParallelSplitHook:
    return _Split(entry, ranks)


def _gather(entry: Any, ranks: Any) -> ContextParallelGatherHook:
    outputs = [entry] if isinstance(entry, ContextParallelOutput) else list(entry)
    return ContextParallelGatherHook(outputs, ranks)  # pyright: ignore[reportArgumentType] # its type names one form


def _untouched(module: nn.Module) -> Callable[[], None]:
    """What removes the traces that diffusers' registry leaves on a module when its last hook is gone."""
    had_forward, had_registry = "forward" in module.__dict__, hasattr(module, "_diffusers_hook")

    def undo() -> None:
        if not had_forward:
            module.__dict__.pop("forward", None)
        if not had_registry:
            module.__dict__.pop("_diffusers_hook", None)

    return undo


def _share_noise(pipe: DiffusionPipeline, group: dist.ProcessGroup) -> None:
    """Make every rank start from rank 0's latents: what is split must be one tensor, and users may not seed."""
    prepare = getattr(pipe, "prepare_latents", None)
    undo: list[Callable[[], None]] = []
    pipe.__dict__[_STATE] = undo
    if prepare is None:
        return

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, Tensor):
                dist.broadcast(tensor, group=group, group_src=0)
        return made

    pipe.__dict__["prepare_latents"] = prepare_latents
    undo.append(lambda: pipe.__dict__.pop("prepare_latents"))


def _transformers(pipe_or_transformer: Any) -> list[nn.Module]:
    if isinstance(pipe_or_transformer, nn.Module):
        return [pipe_or_transformer]
    models = [m for name in _EXPERTS if isinstance(m := getattr(pipe_or_transformer, name, None), nn.Module)]
    if not models:
        raise ValueError(
            f"{type(pipe_or_transformer).__name__} cannot be made parallel: it has no {' or '.join(_EXPERTS)} "
            f"(give a diffusers pipeline or its transformer)"
        )
    return models


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if getattr(module, "processor", None) is not None:
            yield name, module


def _plan(model: nn.Module) -> dict[str, Any]:
    plan = getattr(model, "_cp_plan", None)
    assert isinstance(plan, dict)
    return plan


def _submodules(model: nn.Module, module_id: str) -> list[nn.Module]:
    found = _get_submodule_by_name(model, module_id)
    return found if isinstance(found, list) else [found]


def _refuse_misfit(model: nn.Module) -> None:
    """Raise ValueError with the model's name and what it lacks, if `parallelize` does not fit it."""
    name = type(model).__name__
    if not isinstance(getattr(model, "_cp_plan", None), dict):
        raise ValueError(f"{name} cannot be made parallel: it has no _cp_plan, which says where its tokens are split")
    attentions = list(_attention_modules(model))
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
    for module_id, entry in _plan(model).items():
        try:
            modules = _submodules(model, module_id)
        except ValueError as error:
            raise ValueError(f"{name} cannot be made parallel: its _cp_plan names {module_id!r}: {error}") from None
        inputs = [k for k in entry if isinstance(k, str)] if isinstance(entry, dict) else []
        for module in modules:
            known = inspect.signature(type(module).forward).parameters
            if missing := [k for k in inputs if k not in known]:
                raise ValueError(f"{name} cannot be made parallel: {type(module).__name__} takes no {missing[0]!r}")


def _strides(pipe_or_transformer: Any) -> Strides | None:
    """The pixels and frames a token covers, where a pipeline with a video VAE tells."""
    vae = getattr(getattr(pipe_or_transformer, "vae", None), "config", None)
    config = _transformers(pipe_or_transformer)[0].config
    patch = getattr(config, "patch_size", None)
    temporal, spatial = getattr(vae, "scale_factor_temporal", None), getattr(vae, "scale_factor_spatial", None)
    if temporal is None or spatial is None or not isinstance(patch, list | tuple) or len(patch) != 3:
        return None
    return Strides(temporal, spatial, (patch[0], patch[1], patch[2]))


def _group(group: dist.ProcessGroup | None, models: list[nn.Module]) -> dist.ProcessGroup:
    if group is not None:
        return group
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "no process group and no torchrun: start the script with `torchrun --nproc_per_node <ranks>`, or call "
                "torch.distributed.init_process_group() before hcms.parallelize()"
            )
        timeout = timedelta(minutes=30)  # a rank may wait while another loads weights
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)  # so that a later .to("cuda") goes to this rank's own
            dist.init_process_group("nccl", device_id=device, timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    if "nccl" in str(dist.get_backend()):
        own = torch.device("cuda", torch.cuda.current_device())
        for model in models:
            at = next(model.parameters()).device
            if at.type == "cuda" and at != own:
                raise ValueError(
                    f"this rank's device is {own}, but the model is on {at}: call hcms.parallelize() before moving it "
                    f"to CUDA, or move it to {own}"
                )
    default = dist.group.WORLD
    assert default is not None
    return default
