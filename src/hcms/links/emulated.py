"""A c10d backend, "emulated": Gloo's real exchange, completed no earlier than a link of given speed would.

A laptop has no NVLink to saturate. This backend moves the data through Gloo and delays each work's completion to what
a port of the set bandwidth and latency would need; works queue on the port. Every method, peers included, runs on it
without knowing. Importing this module registers the backend:

    dist.init_process_group("emulated", ...)   # the default group; control traffic goes on new_group(backend="gloo")
    set_link(gbps=0.5, latency_us=50)

The model: each rank has one full-duplex port. A work's bytes to other ranks leave it at `gbps`, after the bytes of all
works issued before, of whatever group; they have arrived `latency_us` later. A work is complete on a rank when its own
bytes have left and those of every peer have arrived: each work carries its sender's time of arrival in a header of
eight bytes, so that a late sender delays its receivers. Ranks must share a clock, that is, a host.
"""

# torch ships no stubs for its Gloo process group.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, perf_counter, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from hcms.links import Link, joining
from hcms.links.named import NamedGroup

NAME = "emulated"
_HEADER_TAG = 1 << 20  # keeps a header of send / recv apart from its payload


@dataclass
class Port:
    """This process's one network port, shared by all its emulated groups as a network card is by its connections."""

    gbps: float = math.inf
    latency_us: float = 0.0
    free_s: float = 0.0
    completed_s: float = 0.0  # when the work that was waited for last was complete, on perf_counter's clock
    works: int = 0  # charged so far, and the bytes that they sent: what tells that a library's traffic came this way
    sent_bytes: int = 0

    def leave(self, nbytes: int) -> float:
        """Queue `nbytes` for sending now; returns when they have arrived, in s of the host's monotonic clock."""
        self.works += 1
        self.sent_bytes += nbytes
        self.free_s = max(monotonic(), self.free_s) + nbytes / (self.gbps * 1e9)
        return self.free_s + self.latency_us * 1e-6


PORT = Port()


def set_link(gbps: float | None = None, latency_us: float = 0.0) -> None:
    """Set the pace of this process's port, for works issued from now on. All ranks set the same.

    Args:
        gbps: 10^9 bytes a second leaving a rank; None is as fast as Gloo is.
        latency_us: from the last byte leaving to its arrival.

    Raises:
        ValueError: a bandwidth that is not positive, or a negative latency.
    """
    if gbps is not None and not gbps > 0:
        raise ValueError(f"an emulated link needs a bandwidth above 0 GB/s, got {gbps}")
    if not latency_us >= 0:
        raise ValueError(f"an emulated link needs a latency of at least 0 µs, got {latency_us}")
    PORT.gbps, PORT.latency_us = (math.inf if gbps is None else gbps), latency_us


class PacedWork(dist.Work):
    """Gloo's works of one operation, complete no earlier than the port allows.

    Args:
        works: the payload's and the header's.
        arrives_s: when this rank's own bytes have arrived.
        peers_arrive_s: float64 headers from peers, valid once `works` are done.
        result: what `get_future` gives; also keeps tensors alive that must outlive the operation.
    """

    def __init__(self, works: list[Any], arrives_s: float, peers_arrive_s: Tensor | None, result: Any) -> None:
        super().__init__()
        self._works = works
        self._arrives_s = arrives_s
        self._peers_arrive_s = peers_arrive_s
        self._result = result
        self._future: Future | None = None
        self._waited = False

    def _due_s(self) -> float:
        peers = self._peers_arrive_s
        return self._arrives_s if peers is None else max(self._arrives_s, float(peers.max()))

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Block until the data is here and the emulated link would have delivered it."""
        if not self._waited:
            self._waited = True
            for work in self._works:
                work.wait()
            early_s = self._due_s() - monotonic()
            if early_s > 0:
                sleep(early_s)
            # c10d hands out a wrapper of this object, so the time of completion is left on the port, for timelines.
            PORT.completed_s = perf_counter() + min(0.0, early_s)
        return True

    def get_future(self) -> Future:
        """A future of the result, which functional collectives ask for. It waits: no thread completes it later."""
        if self._future is None:
            self.wait()
            self._future = Future()
            self._future.set_result(self._result)
        return self._future


class EmulatedProcessGroup(NamedGroup):
    """Gloo behind this process's `PORT`. Each collective is charged the bytes that leave this rank."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(NAME, rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def _paced(self, start: Any, nbytes: int, result: Any) -> PacedWork:
        """Start a symmetric collective that sends `nbytes` off this rank, with a header to every rank."""
        P = self.size()
        arrives_s = PORT.leave(nbytes if P > 1 else 0)
        work = start()
        if P == 1:
            return PacedWork([work], arrives_s, None, result)
        header = torch.full((P,), arrives_s, dtype=torch.float64)
        peers_arrive_s = torch.empty_like(header)
        header_work = self._gloo.alltoall_base(peers_arrive_s, header, [], [], dist.AllToAllOptions())
        return PacedWork([work, header_work], arrives_s, peers_arrive_s, (result, header))

    def alltoall_base(
        self, output: Tensor, input: Tensor, out_splits: Any, in_splits: Any, opts: Any = None
    ) -> PacedWork:
        P, rank = self.size(), self.rank()
        rows_kept = in_splits[rank] if in_splits else input.shape[0] // P
        nbytes = input.nbytes - rows_kept * (input.nbytes // max(1, input.shape[0]))
        opts = opts or dist.AllToAllOptions()
        return self._paced(lambda: self._gloo.alltoall_base(output, input, out_splits, in_splits, opts), nbytes, output)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> PacedWork:
        nbytes = sum(t.nbytes for i, t in enumerate(inputs) if i != self.rank())
        opts = opts or dist.AllToAllOptions()
        return self._paced(lambda: self._gloo.alltoall(outputs, inputs, opts), nbytes, outputs)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> PacedWork:
        nbytes = (self.size() - 1) * sum(t.nbytes for t in inputs)
        opts = opts or dist.AllgatherOptions()
        return self._paced(lambda: self._gloo.allgather(outputs, inputs, opts), nbytes, outputs)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> PacedWork:
        opts = opts or dist.AllgatherOptions()
        nbytes = (self.size() - 1) * input.nbytes
        return self._paced(lambda: self._gloo._allgather_base(output, input, opts), nbytes, output)

    all_gather_single = _allgather_base  # what dist.all_gather_into_tensor calls it from torch 2.13 on

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> PacedWork:
        # Functional collectives come this way with a list of one; a Gloo object offers Python the single form alone.
        assert len(outputs) == len(inputs) == 1
        return self._allgather_base(outputs[0], inputs[0], opts)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> PacedWork:
        # A ring all-reduce sends each byte twice, less one share.
        nbytes = 2 * (self.size() - 1) * sum(t.nbytes for t in tensors) // self.size()
        opts = opts or dist.AllreduceOptions()
        return self._paced(lambda: self._gloo.allreduce(tensors, opts), nbytes, tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> PacedWork:
        opts = opts or dist.BroadcastOptions()
        nbytes = sum(t.nbytes for t in tensors) if opts.rootRank == self.rank() else 0
        return self._paced(lambda: self._gloo.broadcast(tensors, opts), nbytes, tensors)

    def barrier(self, opts: Any = None) -> Any:
        return self._gloo.barrier(opts or dist.BarrierOptions())

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> PacedWork:
        arrives_s = PORT.leave(sum(t.nbytes for t in tensors))
        header = torch.full((1,), arrives_s, dtype=torch.float64)
        works = [self._gloo.send(tensors, dst, tag), self._gloo.send([header], dst, tag + _HEADER_TAG)]
        return PacedWork(works, arrives_s, None, (tensors, header))

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> PacedWork:
        header = torch.empty(1, dtype=torch.float64)
        works = [self._gloo.recv(tensors, src, tag), self._gloo.recv([header], src, tag + _HEADER_TAG)]
        return PacedWork(works, 0.0, header, tensors)


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> EmulatedProcessGroup:
    return EmulatedProcessGroup(store, rank, size, timeout)


if NAME not in dist.Backend.backend_list:
    dist.Backend.register_backend(NAME, _create, devices=["cpu"])


def start(
    rank: int, ranks: int, device: torch.device, timeout: timedelta, store: dist.Store | None
) -> dist.ProcessGroup:
    """The default group over this backend; a Gloo group for control."""
    dist.init_process_group(NAME, **joining(rank, ranks, timeout, store))
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)
    return control


LINK = Link(NAME, "ranks, exchange and results are real; the pace is set", ("cpu",), "each", start)
