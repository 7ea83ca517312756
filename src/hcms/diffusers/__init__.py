"""`parallelize`: a diffusers pipeline on all ranks of a group, in one call; `restore` undoes it.

No model is rewritten. diffusers' models that fit (Wan 2.1, 2.2 and others) say two things themselves, and both are
used as they are: a `_cp_plan`, where tokens are split and gathered, which diffusers' own hooks follow; and, in each
attention processor, which attention takes part, by handing `parallel_config` to diffusers' dispatcher. While the model
runs, that dispatcher sends marked attention through one `SequenceParallelAttention` and leaves all other attention (to
text, to images) with the kernel that it had. Projections, norms and rotary embedding stay the model's own code.

diffusers' `enable_parallelism` is not called, as it asks for an accelerator and brings its own exchange.

Read in this order: `attach` (what a model is given), `route` (where its attention goes), `tokens` (who holds which),
`fit` (what is refused beforehand), `backends`, `caches`, `noise` (what else could differ between ranks), `group`.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist
from diffusers import DiffusionPipeline

from hcms.attention import SequenceParallelAttention
from hcms.clip import heads_refusal
from hcms.diffusers.attach import STATE, attach
from hcms.diffusers.backends import backend_of, kernel_of, name_of
from hcms.diffusers.fit import attention_modules, refuse_misfit, strides_of, transformers_of
from hcms.diffusers.group import group_or_default
from hcms.diffusers.noise import share_noise
from hcms.diffusers.route import Attend

__all__ = ["attach", "parallelize", "restore"]

T = TypeVar("T")


def parallelize(
    pipe_or_transformer: T,
    group: dist.ProcessGroup | None = None,
    method: str = "hcms",
    plan: str | int = "auto",
    kernel: str | None = None,
    *,
    attention: Attend | None = None,
    **options: Any,
) -> T:
    """Split a diffusers model's tokens over the ranks of a group, in place. Collective: all ranks call it.

    Every rank then calls the pipeline with the same arguments and gets the whole result. A pipeline's noise, the first
    and that of a stochastic scheduler's steps, is rank 0's, so an unseeded generator is fine. All experts of a pipeline
    (`transformer`, `transformer_2`) share one attention object, and so its streams, process groups and buffers.

    Args:
        pipe_or_transformer: a diffusers pipeline, or a transformer of one. A pipeline that shall run on CUDA is moved
            there after this call, or to the rank's own device before it.
        group: the ranks; None is the default group, which is made from torchrun's environment if there is none (NCCL
            where CUDA is, on device LOCAL_RANK; else Gloo).
        method, plan: see `SequenceParallelAttention`.
        kernel: a name from `hcms.kernels.KERNELS`; None is the one that the model's own attention backend names, also
            when `set_attention_backend()` comes later, and "sdpa", with a warning, where hcms has no such kernel.
        attention: an attention object to use instead of new ones made of these arguments.
        options: further keyword arguments of `SequenceParallelAttention`.

    Returns the same object.

    Raises:
        ValueError: a model that this does not fit, by name, with what is missing; heads that the ranks do not divide; a
            model that is parallel already; no group and no torchrun. When the model runs: tokens that the ranks do not
            divide, with the sizes that would do; a backend, set since, without a kernel; a cache that decides by data
            of which a rank sees a part, unless ranks can agree.
        RuntimeError: when the model runs: a processor was replaced since, or no attention took part, either of which
            would give a wrong picture.
    """
    if attention is not None and (kernel is not None or options):
        given = ", ".join(f"{name}=" for name in (*(["kernel"] if kernel is not None else []), *options))
        raise ValueError(f"attention= is used as it is, so {given} would say nothing: give one or the other")
    models = transformers_of(pipe_or_transformer)
    for model in models:
        if hasattr(model, STATE):
            raise ValueError(f"this {type(model).__name__} is parallel already: call hcms.restore() on it first")
        refuse_misfit(model)
    group = group_or_default(group, models)
    ranks = dist.get_world_size(group)
    if method != "ring":
        for model in models:
            for name, module in attention_modules(model):
                if refusal := heads_refusal(module.heads, ranks, f"{type(model).__name__} ({name})"):
                    raise ValueError(refusal)

    @cache
    def attention_with(kernel: str) -> Attend:
        return SequenceParallelAttention(group, method, plan, kernel, **options)

    chosen: list[Attend | None] = []  # by model; None leaves the choice to its backend
    for model in models:
        name = kernel
        if attention is None and name is None:
            backend = backend_of(model)
            own = kernel_of(backend)
            attention_with(own or "sdpa")  # what cannot be made is refused now
            if own is None:
                name = "sdpa"
                if dist.get_rank(group) == 0:
                    warnings.warn(
                        f"{type(model).__name__}: hcms has no kernel for the attention backend {name_of(backend)!r}; "
                        f"'sdpa' takes its place where attention is spread over ranks (kernel= names another)",
                        stacklevel=2,
                    )
        chosen.append(attention if attention is not None or name is None else attention_with(name))
    strides = strides_of(pipe_or_transformer)
    for model, fixed in zip(models, chosen, strict=True):
        attach(model, fixed, group, strides=strides, attention_with=None if attention is not None else attention_with)
    if isinstance(pipe_or_transformer, DiffusionPipeline):
        share_noise(pipe_or_transformer, group)
    return pipe_or_transformer


def restore(pipe_or_transformer: T) -> T:
    """Undo `parallelize`: hooks, processors and methods are again the objects that were there. Returns the same object.

    Raises:
        ValueError: it is not parallel.
    """
    undone = False
    targets: list[Any] = [*transformers_of(pipe_or_transformer), pipe_or_transformer]
    for target in targets:
        undo = target.__dict__.pop(STATE, None)
        if undo is not None:
            undone = True
            for step in reversed(undo):
                step()
    if not undone:
        raise ValueError(
            f"this {type(pipe_or_transformer).__name__} is not parallel: hcms.parallelize() was not called on it"
        )
    return pipe_or_transformer
