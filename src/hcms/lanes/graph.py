"""Whole calls as CUDA graphs: captured once a shape, replayed with one launch.

A graph holds addresses. Where the caller's tensors and the new output come to the same addresses again, as in a loop
over layers whose allocator repeats itself, a call is captured by those addresses; where they do not, one graph a shape
reads copies of the inputs and its output is copied out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor

Call = Callable[[Tensor, Tensor, Tensor, Tensor], object]  # q_BLNH, k_BLNH, v_BLNH, out_BLNH: fills the last

BY_ADDRESS = 8  # graphs by address that are kept, the oldest go
SEEN_ONCE = 64  # addresses that are remembered from a single call

_alive: WeakSet[CallGraphs] = WeakSet()


def release_all() -> None:
    """Let go of every graph of this process: NCCL ends no communicator whose works one of them holds."""
    for graphs in list(_alive):
        graphs.release()


class CallGraphs:
    """The graphs of one layer shape.

    Streams: a replay runs on the caller's current stream, as the call itself would. Capturing waits for the device
    once. Memory: graphs share one pool, in which nothing outlives a replay. A graph by address holds none of the
    caller's tensors: they are there again, or it is not replayed.
    """

    def __init__(self) -> None:
        _alive.add(self)
        self._pool = torch.cuda.graph_pool_handle()
        self._by_address: OrderedDict[tuple[int, ...], torch.cuda.CUDAGraph] = OrderedDict()
        self._copies: tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]] | None = None
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._forgotten = 0  # addresses that were seen or captured, and given up for others
        self.refusal: str | None = None  # why calls are not replayed

    def __call__(self, call: Call, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, out_BLNH: Tensor) -> bool:
        """Fill `out_BLNH` by a replay of `call`; False where this call is to be made eagerly.

        Args:
            call: always the same; it has run before, so that capturing allocates and compiles nothing that is kept.
        """
        if self.refusal is not None:
            return False
        given = (q_BLNH, k_BLNH, v_BLNH, out_BLNH)
        key = tuple(x for t in given for x in (t.data_ptr(), *t.stride()))
        graph = self._by_address.get(key)
        if graph is None and key in self._seen and self._forgotten <= SEEN_ONCE:
            graph = self._captured(call, given)
            if graph is not None:
                del self._seen[key]
                self._by_address[key] = graph
                while len(self._by_address) > BY_ADDRESS:
                    self._by_address.popitem(last=False)
                    self._forgotten += 1  # more addresses come again than are kept
        if graph is not None:
            self._by_address.move_to_end(key)
            graph.replay()
            return True
        self._seen[key] = None
        while len(self._seen) > SEEN_ONCE:
            self._seen.popitem(last=False)
            self._forgotten += 1
        return self._forgotten > SEEN_ONCE and self._by_copies(call, given)

    def _by_copies(self, call: Call, given: tuple[Tensor, ...]) -> bool:
        """Addresses do not come again: copy the inputs to where a graph reads them, and its output to where it goes."""
        if self._copies is None:
            with torch.inference_mode(False):  # buffers of this object, to be written in any mode
                own = tuple(torch.empty_like(t) for t in given)
            graph = self._captured(call, own)
            if graph is None:
                return False
            self._copies = (graph, own)
        graph, own = self._copies
        for target, source in zip(own[:3], given[:3], strict=True):
            target.copy_(source)
        graph.replay()
        given[3].copy_(own[3])
        return True

    def _captured(self, call: Call, tensors: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do with the device meanwhile is theirs.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                call(*tensors)
        except RuntimeError as error:
            # What ends a broken capture says only that it was broken; what broke it is its context.
            cause = error.__context__ or error
            self.refusal = f"capture failed: {str(cause).strip().splitlines()[0]}"
            return None
        return graph

    def release(self) -> None:
        """Let go of all graphs; calls are captured anew."""
        self._by_address.clear()
        self._copies = None
