"""Where marked attention goes while a model runs: through hcms, and everything else where it went before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Dispatcher
from torch import Tensor, nn

from hcms.diffusers.backends import active_backend, kernel_of, known_backends, name_of, one_backend
from hcms.diffusers.fit import attention_modules

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Route:
    """A model's way through hcms; to its processors it is their `_parallel_config`, opaque to them.

    Args:
        model: its attention modules get copies of their processors, which must still be theirs when the model runs.
        attention, attention_with: see `attach`.
    """

    def __init__(
        self, model: nn.Module, attention: Attend | None, attention_with: Callable[[str], Attend] | None
    ) -> None:
        self._model, self._name = model, type(model).__name__
        self._given, self._attention_with = attention, attention_with
        self.calls = 0  # of attention that took this way
        self.attention = attention  # of this run, or the last
        self._originals = [(name, module, module.processor) for name, module in attention_modules(model)]
        self._backend_then = one_backend(self._name, self._originals)
        self._routed: list[tuple[str, Any, Any]] = []
        for name, module, original in self._originals:
            module.processor = copy.copy(original)
            module.processor._parallel_config = self
            self._routed.append((name, module, module.processor))
        self._entered: tuple[Any, Any] | None = None  # diffusers' active backend and the processors' own, to put back
        self._other: Callable[..., Tensor] | None = None
        self._other_takes: set[str] = set()
        self._dispatch = self._dispatcher()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Be diffusers' active attention backend, as its own `attention_backend()` context makes another so."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """See that all modules still are routed and by which kernel, and become diffusers' active backend.

        Raises:
            RuntimeError: a module's processor was replaced.
            ValueError: an attention backend was set that hcms has no kernel for.
        """
        self.leave()  # where an interrupt kept the last run from doing so
        self._refuse_replaced()
        own = one_backend(self._name, self._routed)
        outer = own if own is not None else active_backend()
        self.attention = self._attention_by(own, outer)
        self._other, self._other_takes = Dispatcher._backends[outer], Dispatcher._supported_arg_names[outer]
        Dispatcher.register(self)(self._dispatch)  # pyright: ignore[reportArgumentType]
        self._entered = (Dispatcher._active_backend, own)
        Dispatcher._active_backend = self  # pyright: ignore[reportAttributeAccessIssue]
        for _, _, processor in self._routed:
            processor._attention_backend = None  # the active one, which is this

    def leave(self) -> None:
        """Undo `enter`, if it was called."""
        if self._entered is None:
            return
        Dispatcher._active_backend, own = self._entered
        self._entered = None
        for _, _, processor in self._routed:
            processor._attention_backend = own
        for table in (Dispatcher._backends, Dispatcher._constraints, Dispatcher._supported_arg_names):
            table.pop(self, None)

    def close(self) -> None:
        """Give the modules their own processors back."""
        self.leave()
        for _, module, processor in self._originals:
            module.processor = processor

    def _refuse_replaced(self) -> None:
        for name, module, processor in self._routed:
            try:
                now = self._model.get_submodule(name)
            except AttributeError:
                now = None
            what = None
            if now is not module:
                what = f"{name} was replaced"
            elif module.processor is not processor:
                what = f"the attention processor of {name} was replaced by {type(module.processor).__name__}"
            elif processor._parallel_config is not self:
                what = f"diffusers' enable_parallelism() took over {name}"
            if what is not None:
                raise RuntimeError(
                    f"{self._name}: {what} after hcms.parallelize(), so its attention would see only this rank's "
                    f"tokens; call hcms.restore(), change the model, then call hcms.parallelize() again"
                )

    def _attention_by(self, own: Any, outer: Any) -> Attend:
        if self._given is not None and own == self._backend_then:
            return self._given
        kernel = kernel_of(outer)
        if kernel is None:
            raise ValueError(
                f"{self._name}: attention backend {name_of(outer)!r} was set after hcms.parallelize(), and hcms has no "
                f"kernel for it: set one of {', '.join(known_backends())}, or call hcms.restore() on the model"
            )
        if self._attention_with is None:
            raise ValueError(
                f"{self._name}: attention backend {name_of(outer)!r} was set after hcms.parallelize(attention=...), "
                f"whose kernel is fixed: call hcms.restore() on the model, then hcms.parallelize() again"
            )
        return self._attention_with(kernel)

    def _dispatcher(self) -> Callable[..., Tensor]:
        """A function of this object's own, made once, so that compiled blocks find the same one on every run."""

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
            others = {
                "attn_mask": attn_mask,
                "dropout_p": dropout_p,
                "is_causal": is_causal,
                "scale": scale,
                "enable_gqa": enable_gqa,
            }
            if _parallel_config is None:
                assert self._other is not None
                return self._other(query, key, value, **{k: v for k, v in others.items() if k in self._other_takes})
            return self._exchange(query, key, value, **others)

        return dispatch

    @torch.compiler.disable(reason="hcms exchanges data between ranks here")
    def _exchange(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
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
                    f"{self._name} cannot be made parallel: its attention asks for {what}, which hcms does not "
                    f"support; call hcms.restore() on it"
                )
        self.calls += 1
        assert self.attention is not None
        device = query.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return self.attention(query, key, value)
        # What autocast does to torch's attention; inside, kernels and merges keep the dtypes that they choose.
        dtype = torch.get_autocast_dtype(device)
        q_BLNH, k_BLNH, v_BLNH = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
        with torch.autocast(device, enabled=False):
            return self.attention(q_BLNH, k_BLNH, v_BLNH)
