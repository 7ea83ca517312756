"""Where a clip's time goes: hooks and wrappers that note times and touch no tensor.

On a CPU a mark is the host's clock; on CUDA it is an event on the current stream, read after the clip, so that nothing
waits while the clip runs. Spans nest (a transformer's holds those of its blocks); `parts` makes them exclusive, so that
they add up to the clip, with what no span covers as `other`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# The parts of a clip, in the order in which figures stack them.
PARTS = (
    "text_encoder",
    "self_attention",  # with its exchange
    "self_projections",  # around it: query, key, value, output, norms, rotary embedding
    "cross_attention",
    "feed_forward",
    "transformer_rest",  # modulation, norms, embeddings, splitting and gathering tokens
    "scheduler",
    "vae_encode",
    "vae_decode",
    "other",
)
DENOISING = PARTS[1:7]  # the parts that recur in every step

_CORE, _LAYER, _BLOCK = "core", "layer", "block"
_IN_A_BLOCK = (_CORE, _LAYER, _BLOCK, "cross_attention", "feed_forward")


class Breakdown:
    """Notes the parts of clips. One object serves one device; `clear` before each clip.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._spans: list[tuple[str, int, Any, Any]] = []
        self._step = 0
        self._began_s = self._total_ms = self._issued_ms = 0.0

    def clear(self) -> None:
        self._spans.clear()
        self._step = 0

    def _mark(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _ms(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3

    @contextmanager
    def clip(self) -> Iterator[None]:
        """The whole of a clip: everything until its work on the device is done."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        self._began_s = perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize(self._device)
        self._total_ms = (perf_counter() - self._began_s) * 1e3

    def issued(self) -> None:
        """Note the host's time since the clip began: all that the device is to do until here has been issued."""
        self._issued_ms = (perf_counter() - self._began_s) * 1e3

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._spans.append((name, self._step, begin, self._mark()))

    def attention(self, attend: Attend) -> Attend:
        """`attend` with its calls noted: the exchange and the attention between projections."""

        def noted(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
            with self.span(_CORE):
                return attend(q_BLNH, k_BLNH, v_BLNH)

        return noted

    @contextmanager
    def watching(self, pipe: Any = None, *, transformers: list[nn.Module] | None = None) -> Iterator[Breakdown]:
        """Note the parts of a pipeline (or of bare transformers) while inside; everything is taken off afterwards."""
        undo: list[Callable[[], None]] = []
        if transformers is None:
            transformers = [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]
        try:
            for transformer in transformers:
                self._watch_module(transformer, "transformer", undo)
                for block in transformer.blocks:  # pyright: ignore[reportGeneralTypeIssues]
                    self._watch_module(block, _BLOCK, undo)
                    for name, part in (("attn1", _LAYER), ("attn2", "cross_attention"), ("ffn", "feed_forward")):
                        self._watch_module(getattr(block, name), part, undo)
            if pipe is not None:
                self._watch_module(pipe.text_encoder, "text_encoder", undo)
                self._watch_method(pipe.vae, "encode", "vae_encode", undo)
                self._watch_method(pipe.vae, "decode", "vae_decode", undo)
                self._watch_method(pipe.scheduler, "step", "scheduler", undo, after=self._next_step)
            yield self
        finally:
            for step in reversed(undo):
                step()

    def _next_step(self) -> None:
        self._step += 1

    def _watch_module(self, module: nn.Module, name: str, undo: list[Callable[[], None]]) -> None:
        begins: list[Any] = []
        handles = [
            module.register_forward_pre_hook(lambda *_: begins.append(self._mark())),
            module.register_forward_hook(lambda *_: self._spans.append((name, self._step, begins.pop(), self._mark()))),
        ]
        undo.extend(handle.remove for handle in handles)

    def _watch_method(
        self,
        owner: Any,
        method: str,
        name: str,
        undo: list[Callable[[], None]],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        original, of_its_own = getattr(owner, method), method in owner.__dict__

        @wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                result = original(*args, **kwargs)
            after()
            return result

        owner.__dict__[method] = noted  # on this object alone; past nn.Module's own bookkeeping
        undo.append(lambda: owner.__dict__.update({method: original}) if of_its_own else owner.__dict__.pop(method))

    @property
    def total_ms(self) -> float:
        """The last clip, from its call until its work was done."""
        return self._total_ms

    @property
    def issued_ms(self) -> float:
        """Of the last clip, from its call until `issued`."""
        return self._issued_ms

    def parts(self, *, blocks: float = 1.0) -> dict[str, float]:
        """ms of each of `PARTS` in the last clip; they add up to `total_ms`.

        Args:
            blocks: of a transformer that has only some of its blocks, which are alike: so many times those that ran.
                What is outside of blocks counts once. The parts then add up to what all blocks would have taken.
        """
        sums: dict[str, float] = defaultdict(float)
        for name, _, begin, end in self._spans:
            sums[name] += self._ms(begin, end)
        more_ms = (blocks - 1) * sums[_BLOCK]
        for name in _IN_A_BLOCK:
            sums[name] *= blocks
        sums["transformer"] += more_ms
        return _exclusive(sums, self._total_ms + more_ms)

    def by_step(self) -> list[dict[str, float]]:
        """ms of each of `DENOISING` in every denoising step of the last clip."""
        steps: list[dict[str, float]] = [defaultdict(float) for _ in range(self._step)]
        for name, step, begin, end in self._spans:
            if name in ("transformer", _LAYER, _CORE, "cross_attention", "feed_forward", "scheduler"):
                steps[step][name] += self._ms(begin, end)
        return [{part: _exclusive(sums, 0.0)[part] for part in DENOISING} for sums in steps]


def _exclusive(sums: dict[str, float], total_ms: float) -> dict[str, float]:
    """Nested sums as parts that exclude one another."""
    get = defaultdict(float, sums)
    parts = {name: get[name] for name in PARTS}
    parts["self_attention"] = get[_CORE]
    parts["self_projections"] = get[_LAYER] - get[_CORE]
    parts["transformer_rest"] = get["transformer"] - get[_LAYER] - get["cross_attention"] - get["feed_forward"]
    parts["other"] = total_ms - sum(ms for name, ms in parts.items() if name != "other")
    return parts
