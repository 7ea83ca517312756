"""Whole calls as CUDA graphs: captured once a shape, replayed with one launch.

A graph holds addresses. Where the caller's tensors come to the same addresses again, as in a loop over layers whose
allocator repeats itself, a call is captured by those addresses; where they do not, one graph a shape reads copies of
the inputs. The result is always a new tensor of the caller's: the graph writes its own, which is copied out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

Call = Callable[[Tensor, Tensor, Tensor, Tensor], None]  # q_BLNH, k_BLNH, v_BLNH, out_BLNH: fills the last

BY_ADDRESS = 8  # graphs by address that are kept, the oldest go
SEEN_ONCE = 64  # addresses that are remembered from a single call


class CallGraphs:
    """The graphs of one layer shape.

    Streams: a replay runs on the caller's current stream, as the call itself would. Capturing waits for the device
    once. Memory: graphs share one pool, whose outputs are copied out before another graph is replayed.

    Args:
        call: the eager call; it has run before, so that capturing allocates and compiles nothing that is kept.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[tuple[int, ...] | None, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = OrderedDict()
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self.refusal: str | None = None  # why calls are not replayed

    def __call__(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor | None:
        """The result by a replay; None where this call is to be made eagerly."""
        if self.refusal is not None:
            return None
        inputs = [q_BLNH, k_BLNH, v_BLNH]
        key = tuple(x for t in inputs for x in (t.data_ptr(), *t.stride()))
        known = self._graphs.get(key)
        if known is None:
            if key in self._seen:
                known = self._capture(key, inputs)
            elif len(self._seen) >= SEEN_ONCE:  # addresses do not come again
                known = self._graphs.get(None) or self._capture(None, [torch.empty_like(t) for t in inputs])
                if known is not None:
                    for static, given in zip(known[1], inputs, strict=False):
                        static.copy_(given)
            else:
                self._seen[key] = None
            if known is None:
                return None
        graph, tensors = known
        graph.replay()
        return tensors[-1].clone()

    def _capture(
        self, key: tuple[int, ...] | None, inputs: list[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor]] | None:
        graph, out_BLNH = torch.cuda.CUDAGraph(), torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
        try:
            # thread_local: what other threads do with the device meanwhile is theirs.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._call(inputs[0], inputs[1], inputs[2], out_BLNH)
        except RuntimeError as error:
            self.refusal = f"capture failed: {str(error).strip().splitlines()[0]}"
            return None
        # A graph by address holds none of the caller's tensors: they are there again, or it is not replayed.
        self._graphs[key] = (graph, [*inputs, out_BLNH] if key is None else [out_BLNH])
        while len(self._graphs) > BY_ADDRESS:
            self._graphs.popitem(last=False)
        return self._graphs[key]
