"""What a transformer is given: hooks that split and gather its tokens, routed processors, and checks around each run.

All hooks are torch's own (`register_forward_hook`), which stand around a module's `forward`. diffusers' caches and
offloading rewrite `forward` itself; so they lie inside, whether they are enabled before or after, and see a rank's
share of the tokens, as the layers do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hcms.clip import ClipShape, Strides
from hcms.diffusers import caches
from hcms.diffusers.fit import plan_of, submodules
from hcms.diffusers.route import Attend, Route
from hcms.diffusers.tokens import gather, split

STATE = "_hcms"  # on a transformer or pipeline: the steps that `restore` takes, last first


def attach(
    model: nn.Module,
    attention: Attend | None,
    group: dist.ProcessGroup | None,
    *,
    strides: Strides | None = None,
    attention_with: Callable[[str], Attend] | None = None,
) -> None:
    """Send a transformer's marked attention through `attention`, and split its tokens over `group`; see `parallelize`.

    Args:
        attention: where it goes while the model's own attention backend stays; None is what the backend names.
        group: None splits nothing: then `attention` gets whole sequences, as when one device is timed.
        strides: make refusals speak of video frames and pixels.
        attention_with: gives the attention with a kernel of that name; without it, a backend that is set later is
            refused.
    """
    undo: list[Callable[[], None]] = []
    object.__setattr__(model, STATE, undo)  # past nn.Module, so that nothing is registered as a submodule
    route = Route(model, attention, attention_with)
    run = _Run(model, route, strides, group)
    undo += [route.close, run.forget]
    handles = [model.register_forward_pre_hook(run.begin, with_kwargs=True)]
    if group is not None:
        for module_id, entry in plan_of(model).items():
            for module in submodules(model, module_id):
                handles += split(module, entry, group) if isinstance(entry, dict) else gather(module, entry, group)
    handles.append(model.register_forward_hook(run.end, always_call=True))
    undo.extend(handle.remove for handle in handles)


class _Run:
    """Around a transformer's forward: refuse what would go wrong, activate the route, and see that it was taken."""

    def __init__(
        self, model: nn.Module, route: Route, strides: Strides | None, group: dist.ProcessGroup | None
    ) -> None:
        self._modules = list(model.modules())  # walking a large model on every step would cost the host
        self._route, self._strides, self._group = route, strides, group
        self._calls = 0
        self._agreeing: list[Any] = []

    @torch.compiler.disable(reason="hcms checks the model before each run")
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refuse_tokens(kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(args), None))
        if self._group is not None:
            caches.settle(type(module).__name__, self._modules, self._group, self._agreeing)
        self._calls = self._route.calls
        self._route.enter()

    @torch.compiler.disable(reason="hcms checks that its attention took part")
    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._route.leave()
        if output is None:
            return  # it raised, and torch calls this hook all the same
        calls = self._route.calls
        if calls == 0 or (calls == self._calls and not caches.skipping(self._modules)):
            raise RuntimeError(
                f"{type(module).__name__} ran without any attention going through hcms: its tokens were split, so the "
                f"result would be wrong; is a custom attention processor installed?"
            )

    def forget(self) -> None:
        caches.unsettle(self._agreeing)

    def _refuse_tokens(self, hidden: Any) -> None:
        s = self._strides
        if s is None or self._group is None or not isinstance(hidden, Tensor) or hidden.ndim != 5:
            return
        _, _, latent_frames, rows, columns = hidden.shape
        clip = ClipShape((latent_frames - 1) * s.temporal + 1, rows * s.spatial, columns * s.spatial, s)
        if refusal := clip.refusal(dist.get_world_size(self._group)):
            raise ValueError(refusal)
