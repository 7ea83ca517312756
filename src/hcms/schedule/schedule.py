"""A schedule is data: operations on lanes, in the order in which the host issues them.

Four readers share one `Schedule`: lanes run it, `simulate.py` prices it, the timeline figure draws it
and property tests check it. A new idea (a lane, a deeper prefetch) is a new builder and nothing else.

Lanes are first in, first out, as CUDA streams are: an operation starts when the one before it on its lane has ended
and every operation named in `after` has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

Kind = Literal["pack", "exchange", "attend", "return", "unpack", "rotate"]
First = Literal["exchange", "return"]

COMPUTE = "compute"
COMPUTE_2 = "compute-2"
COMM = "comm"
COMM_OUT = "comm-out"
COMPUTE_LANES = (COMPUTE, COMPUTE_2)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Args:
        kind: `exchange` (sequence shards to head shards), `attend`, `return` (the reverse, for the output), or
            `rotate` (Ring Attention: pass K and V to the next rank). A schedule that has `pack` (lay a chunk's heads
            side by side, the own share straight where it is read) and `unpack` (put a returned chunk into its place)
            moves bytes alone in its exchanges and returns; in one that has none, they make these copies themselves.
        chunk: index into the schedule's cut; for Ring Attention, the step.
        lane: the lane that carries it.
        after: indices of the operations that must have ended, all smaller than this operation's own.
        tensors: what an `exchange` carries: `"qkv"` packed in one collective, `"kv"`, or `"q"`, `"k"`, `"v"` alone.
        part: `(i, n)`: of n parts of the chunk's queries, the i-th; its rows are the i-th part of each rank's tokens.
            What a part concerns are an exchange of `"q"`, an `attend`, a `return` and an `unpack`.
    """

    kind: Kind
    chunk: int
    lane: str
    after: tuple[int, ...] = ()
    tensors: str = "qkv"
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Schedule:
    """Operations in host issue order, over a cut of this rank's heads (or over the steps of a ring).

    Args:
        name: of the builder, with its options.
        cut: heads of each chunk.
        ops: the operations.
        comm_sms: SMs of a GPU that its communication lanes have to themselves; attention gets the rest.

    Raises:
        ValueError: an operation depends on itself or on a later one, or the cut holds a chunk without heads.
    """

    name: str
    cut: tuple[int, ...]
    ops: tuple[Op, ...]
    comm_sms: int = 0

    def __post_init__(self) -> None:
        if not self.cut or min(self.cut) < 1:
            raise ValueError(f"a cut needs chunks of at least one head each, got {self.cut}")
        for index, op in enumerate(self.ops):
            if any(not 0 <= earlier < index for earlier in op.after):
                raise ValueError(f"{self.name}: operation {index} ({op.kind}) must come after all it waits for")

    @cached_property
    def lanes(self) -> tuple[str, ...]:
        """The lanes in order of first use."""
        return tuple(dict.fromkeys(op.lane for op in self.ops))

    @cached_property
    def copies_apart(self) -> bool:
        """Whether packing and unpacking are operations of their own, so that an exchange moves bytes and no more."""
        return any(op.kind == "pack" for op in self.ops)

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """For each chunk, into how many parts its queries are split."""
        parts = [1] * len(self.cut)
        for op in self.ops:
            if op.kind == "attend":
                parts[op.chunk] = op.part[1]
        return tuple(parts) if self.name != "ring" else (1,) * len(self.cut)

    @cached_property
    def overlaps(self) -> bool:
        """Whether any communication may run beside computation."""
        return len(self.lanes) > 1

    @cached_property
    def chunk_starts(self) -> tuple[int, ...]:
        """First head of each chunk, among this rank's heads."""
        return (0, *accumulate(self.cut[:-1]))


def serial(cut: tuple[int, ...], *, split_qkv: bool = False) -> Schedule:
    """Everything on one lane, one after the other.

    One chunk with `split_qkv` is Ulysses as DeepSpeed and Wan2.2 run it (three exchanges and a return); one chunk
    without is `ulysses-packed`; several chunks are `hcms-serial`, which shows what chunking alone costs.
    """
    ops: list[Op] = []

    def add(kind: Kind, chunk: int, tensors: str = "qkv") -> None:
        ops.append(Op(kind, chunk, COMPUTE, (len(ops) - 1,) if ops else (), tensors))

    for chunk in range(len(cut)):
        for tensors in ("q", "k", "v") if split_qkv else ("qkv",):
            add("exchange", chunk, tensors)
        add("attend", chunk)
        add("return", chunk)
    return Schedule("serial-split" if split_qkv else "serial", cut, tuple(ops))


def two_lane(
    cut: tuple[int, ...], *, prefetch: int | None = None, first: First = "exchange", return_lane: str = COMM
) -> Schedule:
    """The paper's pipeline: attention on one lane, all communication on another.

    Args:
        cut: heads of each chunk.
        prefetch: how many chunks' exchanges may run ahead of the chunk being attended to; `None` is all of them
            (deviation 3: the paper describes one).
        first: once a chunk is attended to, which goes onto the communication lane first: the next chunk's
            `exchange`, or this chunk's `return`.
        return_lane: the lane of the returns; `COMM_OUT` makes it `three_lane`.

    Raises:
        ValueError: `prefetch` is below 1.
    """
    chunks = len(cut)
    depth = chunks if prefetch is None else prefetch
    if depth < 1:
        raise ValueError(f"prefetch must be at least 1 chunk, got {prefetch}")
    ops: list[Op] = []
    exchanged: list[int] = []
    attended: list[int] = []

    def exchange_next() -> None:
        chunk = len(exchanged)
        if chunk < chunks:
            # The depth is a bound on what is in flight: chunk c waits for chunk c - depth - 1 to be attended to.
            freed = chunk - depth - 1
            ops.append(Op("exchange", chunk, COMM, (attended[freed],) if freed >= 0 else ()))
            exchanged.append(len(ops) - 1)

    def return_(chunk: int) -> None:
        ops.append(Op("return", chunk, return_lane, (attended[chunk],)))

    for _ in range(depth + 1):
        exchange_next()
    for chunk in range(chunks):
        ops.append(Op("attend", chunk, COMPUTE, (exchanged[chunk],)))
        attended.append(len(ops) - 1)
        if first == "return":
            return_(chunk)
            exchange_next()
        else:
            exchange_next()
            return_(chunk)
    lanes = "two-lane" if return_lane == COMM else "three-lane"
    ahead = "all" if depth >= chunks - 1 else str(depth)
    return Schedule(f"{lanes}/prefetch={ahead}/{first}-first", cut, tuple(ops))


def three_lane(cut: tuple[int, ...], *, prefetch: int | None = None, first: First = "exchange") -> Schedule:
    """`two_lane` with the returns on a lane and communicator of their own: none queues behind an exchange."""
    return two_lane(cut, prefetch=prefetch, first=first, return_lane=COMM_OUT)


def ring(ranks: int) -> Schedule:
    """Ring Attention over `ranks` steps: step s attends to the K and V that came from s ranks away.

    K and V live in two buffers, so the rotation that overwrites step s - 1's buffer waits for that step's attention.
    """
    ops: list[Op] = []
    rotated: int | None = None
    attended: int | None = None
    for step in range(ranks):
        arrived = () if rotated is None else (rotated,)
        if step < ranks - 1:
            ops.append(Op("rotate", step, COMM, arrived if attended is None else (*arrived, attended)))
            rotated = len(ops) - 1
        ops.append(Op("attend", step, COMPUTE, arrived))
        attended = len(ops) - 1
    return Schedule("ring", (1,) * ranks, tuple(ops))
