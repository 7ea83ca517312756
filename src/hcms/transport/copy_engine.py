"""Exchanges by copy engine: every rank writes rows of heads straight into its peers' memory, and no SM sends them.

Peers' receive buffers are symmetric memory, mapped into every rank. A chunk's rows go from where they lie in q, k and v
(a pitch of N·H elements) to where the peer's kernel reads them, a 2D copy a tensor and peer; results go back as they
lie. Order between ranks is kept by words in symmetric memory that streams write and wait for, which needs no SM either
and does not stop the host.

Edges between ranks, each a word for each peer. Values are fixed (1 is raised, 0 is taken), so that a captured graph
replays them, and one rank may replay a graph where another issues a call:

- *free*: before its first write, a rank raises this and waits until every peer has. Its stream has waited for all that
  the caller's stream held, so nobody writes into what is still read, or poisoned, for the call before;
- *arrived*, one a message: attention waits until every peer's rows are there. K and V that come apart from their
  queries need none, as they are written before these;
- *returned*, one a part of a chunk's output: as much for unpacking.

Who waits takes the word down again. The next one to raise it has waited for `free` since, which was raised behind that.
(`send_back` by itself, as calibration calls it, must not come again before its peers have taken the word down.)

Waits have no timeout: a rank that fails in a call leaves its peers' streams waiting, and its words raised. Lanes need
hardware queues of their own (`CUDA_DEVICE_MAX_CONNECTIONS=32` before CUDA starts), or one's wait holds up another's
work. Races were provoked between processes on one card, where no write is remote. Two H100 over NVLink gave the right
bits at every checked call; a wait that flushes remote writes (`CU_STREAM_WAIT_VALUE_FLUSH`) was not asked for.
"""

# cuda-bindings and symmetric memory come without stubs.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.hardware import this_host
from hcms.objects import everyones
from hcms.schedule.schedule import Schedule
from hcms.transport import Transport
from hcms.transport.layout import HeadExchange, LayerShape, _Regions

NAME = "copy-engine"
_FREE = ("free", 0, 0)
_BEFORE_QUERIES = "kv"  # written before the chunk's first queries, on one stream: their word says both
_HINT = "transport='collective' goes everywhere"


class CopyEngineExchange(HeadExchange):
    """`HeadExchange` whose messages are written into peers' memory. Construction is collective.

    Buffers: what arrives (three tensors of M heads) and what returns (one) are symmetric memory of this object; what
    leaves is read where it lies, so inputs must stay until the caller's stream has waited for every lane. A result that
    the kernel does not leave in rows of tokens is copied into a buffer of its own first.

    Raises:
        RuntimeError: on all ranks alike: cuda-bindings is not installed, ranks are on several hosts, or a peer's memory
            cannot be mapped.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        schedule: Schedule,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        **options: bool,
    ) -> None:
        self._peers = _Peers(group, device)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        super().__init__(schedule, ranks, shape, dtype, device, rank=rank, **options)
        self._inputs_BLNH: dict[str, Tensor] = {}
        messages = [
            (c, *key) for c, chunk in enumerate(self._chunks) for key in chunk.messages if key[0] != _BEFORE_QUERIES
        ]
        returns = [(c, "o", i) for c, chunk in enumerate(self._chunks) for i in range(len(chunk.returns))]
        self._peers.edges([_FREE, *messages, *returns])
        first = next(op for op in schedule.ops if op.kind == "exchange")
        self._first = (first.chunk, first.tensors, first.part[0])
        # The own share goes by copy engine as well, unless it is copied apart; nearest ranks first, so that not all
        # write to one at once.
        self._targets = [(rank + d) % self.ranks for d in range(1 if self._own_apart else 0, ranks)]

    def _allocate(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        recv, recv_back = self._peers.empty(count, dtype), self._peers.empty(count // 3, dtype)
        self._buffers = [recv, recv_back, torch.empty(count // 3, dtype=dtype, device=device)]

    def _regions(self, start: int, stop: int) -> _Regions:
        recv, recv_back, send_back = self._buffers
        back = slice(start // 3, stop // 3)
        # Nothing is sent from a buffer: of what a message has there, nothing is used.
        return _Regions(recv[start:stop], recv[start:stop], send_back[back], recv_back[back])

    def bind(self, inputs_BLNH: dict[str, Tensor], out_BLNH: Tensor) -> None:
        """Take a call's tensors. Those whose heads do not lie side by side are copied, on the current stream."""
        H = self._H
        self._inputs_BLNH = {
            name: x if x.stride(3) == 1 and x.stride(2) == H else x.contiguous() for name, x in inputs_BLNH.items()
        }
        super().bind(self._inputs_BLNH, out_BLNH)

    def release(self) -> None:
        super().release()
        self._inputs_BLNH = {}

    def pack(self, chunk: int, tensors: str, part: int = 0) -> None:
        """Copy the own share into its place, on the current stream, where that is not left to the exchange."""
        if self._own_apart:
            message = self._chunks[chunk].messages[tensors, part]
            for name in tensors:
                message.recv[name].copy_(self._inputs[name], message.place, self._own)

    def exchange(
        self, chunk: int, tensors: str, group: dist.ProcessGroup, async_op: bool, part: int = 0
    ) -> dist.Work | None:
        """Write a message's rows to every rank, and wait for theirs, on the current stream."""
        if (chunk, tensors, part) == self._first:
            self._peers.meet(_FREE)
        message = self._chunks[chunk].messages[tensors, part]
        rows, heads = message.place.tokens, message.place.heads
        for peer in self._targets:
            for name in tensors:
                x_BLmH = self._inputs_BLNH[name][:, rows, peer * self._M + heads.start : peer * self._M + heads.stop]
                there_BlmH = message.recv[name].plain[self._rank].transpose(0, 1)
                self._peers.write(peer, self._buffers[0], there_BlmH, x_BLmH)
        if tensors != _BEFORE_QUERIES:
            self._peers.meet((chunk, tensors, part))
        return None

    def send_back(
        self, chunk: int, o_BSmH: Tensor, group: dist.ProcessGroup, async_op: bool, part: int = 0
    ) -> dist.Work | None:
        """Write a chunk's output to the ranks whose tokens it is of, and wait for theirs, on the current stream."""
        back = self._chunks[chunk].returns[part]
        o_PlBmH = self.sendable(chunk, o_BSmH, part)
        for peer in self._targets:
            there_lBmH = back.slots.recv[self._rank]
            self._peers.write(
                peer, self._buffers[1], there_lBmH.flatten()[None, None], o_PlBmH[peer].flatten()[None, None]
            )
        self._peers.meet((chunk, "o", part))
        return None


class _Peers:
    """Symmetric memory of a group's ranks: buffers that peers write, and the words that order them. Collective."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._addresses: dict[int, list[int]] = {}  # by the own address of a buffer, that of every rank's
        self._handles: list[Any] = []
        self._edges: dict[tuple[Any, ...], int] = {}
        missing = None
        try:
            from cuda.bindings import driver, runtime
        except ImportError:
            missing = "cuda-bindings is not installed"
        else:
            self._driver, self._runtime = driver, runtime
        self._agree(missing)
        hosts = set(everyones(this_host(), group))
        self._agree(f"ranks are on {len(hosts)} hosts" if len(hosts) > 1 else None)

    def _agree(self, refusal: str | None) -> None:
        """Raise what any rank has to say against it, on all of them."""
        said = [(rank, why) for rank, why in enumerate(everyones(refusal, self._group)) if why is not None]
        if said:
            raise RuntimeError(f"transport={NAME!r}: {said[0][1]} (rank {said[0][0]}); {_HINT}")

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """A buffer of this rank that every rank can write."""
        from torch.distributed import _symmetric_memory as symmetric

        refusal = None
        try:
            made = symmetric.empty(count, dtype=dtype, device=self._device)
        except RuntimeError as error:  # out of memory, say: before the others wait for this rank
            refusal = str(error).strip().splitlines()[0]
        self._agree(refusal)
        try:
            handle = symmetric.rendezvous(made, self._group)
            addresses = [handle.get_buffer(r, (1,), dtype).data_ptr() for r in range(self._ranks)]
        except RuntimeError as error:
            refusal = str(error).strip().splitlines()[0]
        self._agree(refusal)
        self._handles.append(handle)
        self._addresses[made.data_ptr()] = addresses
        return made

    def edges(self, names: list[tuple[Any, ...]]) -> None:
        """Make the words of these edges, all of them down on every rank before any is raised."""
        self._edges = {name: i for i, name in enumerate(names)}
        self._words = self.empty(len(names) * self._ranks, torch.int32)
        self._words.zero_()
        torch.cuda.synchronize(self._device)
        everyones(None, self._group)

    def write(self, peer: int, own_buffer: Tensor, there_BlmH: Tensor, x_BlmH: Tensor) -> None:
        """Copy rows into a peer's buffer, where `there_BlmH` lies in the own one. Last dimensions are whole rows."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        size, kind = x_BlmH.element_size(), self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        base = self._addresses[own_buffer.data_ptr()][peer] - own_buffer.data_ptr()
        rows, width = x_BlmH.shape[1], x_BlmH[0, 0].numel() * size
        for x, there in zip(x_BlmH, there_BlmH, strict=True):
            pitches = [max(t.stride(0) * size, width) for t in (there, x)]
            _done(
                self._runtime.cudaMemcpy2DAsync(
                    base + there.data_ptr(), pitches[0], x.data_ptr(), pitches[1], width, rows, kind, stream
                )
            )

    def meet(self, edge: tuple[Any, ...]) -> None:
        """Raise an edge's word at every peer behind what this stream has written, then wait for theirs."""
        self.raise_words(edge)
        self.take_words(edge)

    def raise_words(self, edge: tuple[Any, ...]) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        default = self._driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        for peer in self._others:
            there = self._addresses[self._words.data_ptr()][peer] + self._offset(edge, self._rank)
            _done(self._driver.cuStreamWriteValue32(stream, there, 1, default))

    def take_words(self, edge: tuple[Any, ...]) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        equal = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        default = self._driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        for peer in self._others:
            here = self._words.data_ptr() + self._offset(edge, peer)
            _done(self._driver.cuStreamWaitValue32(stream, here, 1, equal))
            _done(self._driver.cuStreamWriteValue32(stream, here, 0, default))

    @property
    def _others(self) -> list[int]:
        return [(self._rank + d) % self._ranks for d in range(1, self._ranks)]

    def _offset(self, edge: tuple[Any, ...], rank: int) -> int:
        return 4 * (self._edges[edge] * self._ranks + rank)


def _done(answer: Any) -> None:
    """Raise what the driver or the runtime has to say."""
    code = answer[0] if isinstance(answer, tuple) else answer
    if int(code):
        raise RuntimeError(f"transport={NAME!r}: {code.name}")


TRANSPORT = Transport(
    NAME,
    "copy engines write rows into peers' symmetric memory, without packing",
    ("cuda",),
    False,
    CopyEngineExchange,
)
