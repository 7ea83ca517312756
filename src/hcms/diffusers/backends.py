"""diffusers' attention backends and hcms' kernels: which is which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Dispatcher
from torch import nn

from hcms.diffusers.fit import attention_modules
from hcms.kernels import KERNELS


def known_backends() -> list[str]:
    """diffusers' names of the backends that hcms has a kernel for."""
    return [k.diffusers_backend for k in KERNELS.values() if k.diffusers_backend]


def kernel_of(backend: Any) -> str | None:
    """The kernel that does what that backend does; None if hcms has none."""
    return next((k.name for k in KERNELS.values() if k.diffusers_backend == backend), None)


def name_of(backend: Any) -> str:
    """A backend's name as users give it; None is diffusers' default."""
    return "diffusers' default" if backend is None else str(getattr(backend, "value", backend))


def active_backend() -> Any:
    """What attention without a backend of its own goes to: diffusers' default, or the one that a context made so."""
    return Dispatcher._active_backend


def backend_of(model: nn.Module) -> Any:
    """The backend that a model's attention goes to now.

    Raises:
        ValueError: its modules are set to several.
    """
    found = [(name, module, module.processor) for name, module in attention_modules(model)]
    own = one_backend(type(model).__name__, found)
    return own if own is not None else active_backend()


def one_backend(model: str, routed: Iterable[tuple[str, Any, Any]]) -> Any:
    """What all processors are set to; None is diffusers' active backend.

    Raises:
        ValueError: they are set to several.
    """
    first: tuple[str, Any] | None = None
    for name, _, processor in routed:
        backend = processor._attention_backend
        if first is None:
            first = (name, backend)
        elif backend != first[1]:
            raise ValueError(
                f"{model} has several attention backends ({first[0]}: {name_of(first[1])}, {name}: "
                f"{name_of(backend)}), and hcms takes one a model: call set_attention_backend() on the model"
            )
    return first[1] if first is not None else None
