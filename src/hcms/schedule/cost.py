"""What each operation of a schedule costs: a profile's costs by size, applied to one workload.

The sizes, for a chunk of m heads a rank (B batch, S whole sequence, L = S/P, N all heads, M = N/P, H head dim, P ranks,
e bytes an element):

- an exchange of t tensors sends t·B·L·m·H·e to each of P - 1 peers, after packing t·B·S·m·H·e; a return sends the same
  for t = 1 and copies what arrives into its place;
- on a CPU the issuing thread packs (`host_ms`), the link works by itself (`lane_ms`), and the thread unpacks when it
  first waits (`finish_ms`): exchanges of several heads, which are copied heads first, and returns;
- on a GPU packing, link and unpacking follow each other on the communication lane, exchanges are used as they lie, and
  the host only launches;
- a ring's rotation sends K and V, 2·B·L·N·H·e; its step attends L x L over N heads and merges in float32.

Communication and attention slow each other down where a schedule overlaps them, unless its kernels have SMs of their
own. Of the profile's two factors each lane gets the share of its time that the other can cover: attention takes
`1 + (slowdown - 1) · min(1, T_comm / T_attention)` times as long, communication likewise, whatever the cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hcms.schedule.contend import Stage, contend
from hcms.schedule.fit import fit
from hcms.schedule.profile import AttendPoint, Level, Profile, load
from hcms.schedule.schedule import COMM, COMM_OUT, COMPUTE_2, Op, Schedule, ring, serial
from hcms.schedule.simulate import Costs, OpCost, simulate
from hcms.schedule.timeline import Span, Timeline

__all__ = [
    "AttendPoint",
    "Costs",
    "Level",
    "Profile",
    "Workload",
    "WorkloadCosts",
    "fit",
    "load",
    "predict",
]

COOL_DUTY = 0.65  # measured on an H100 and an H200 of 700 W: below, attention ran at the clock of single calls
_TURNS = 3  # the share of attention and its slowdown settle within a part in a thousand,
_SETTLED = 0.005  # and sooner where the clock comes out as near as this: then times do within a part in a thousand

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Workload:
    """One attention layer over all ranks: S tokens, N heads of H, spread over P ranks.

    Raises:
        ValueError: ranks that do not divide the heads or the tokens, or a dtype of unknown size.
    """

    seq_len: int
    heads: int
    ranks: int
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.heads % self.ranks:
            raise ValueError(f"{self.heads} heads cannot be divided among {self.ranks} ranks")
        if self.seq_len % self.ranks:
            raise ValueError(f"{self.seq_len} tokens cannot be divided among {self.ranks} ranks")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(ITEMSIZE)}")

    @property
    def heads_a_rank(self) -> int:
        return self.heads // self.ranks

    def tensor_bytes(self, heads_a_rank: int) -> int:
        """One tensor's share of this rank, for a chunk of so many heads: as many bytes before as after an exchange."""
        return self.batch * self.seq_len * heads_a_rank * self.head_dim * ITEMSIZE[self.dtype]

    def off_rank(self, nbytes: float) -> float:
        """The part of `nbytes` that an all-to-all sends to other ranks."""
        return nbytes * (self.ranks - 1) / self.ranks


class WorkloadCosts:
    """The `Costs` of one workload on the ranks of one profile. Any kind of Schedule.

    Args:
        graph: calls are replayed as CUDA graphs: the host issues nothing by itself.
        sustained: calls follow each other, as in a model's layers, so that a GPU's power limit may set its clock.
        hot: attention's clock: 0 of a call by itself, 1 of calls without a pause; `predict` finds it if `sustained`.
    """

    def __init__(
        self,
        profile: Profile,
        workload: Workload,
        *,
        graph: bool = False,
        sustained: bool = False,
        hot: float = 0.0,
    ) -> None:
        self.profile = profile
        self.workload = workload
        self.graph, self.sustained, self.hot = graph, sustained, hot
        self._known: dict[tuple[Any, ...], OpCost] = {}
        self._known_stages: dict[tuple[Any, ...], tuple[Stage, ...]] = {}

    @property
    def host_computes(self) -> bool:
        return self.profile.device == "cpu"

    @property
    def ports(self) -> int:
        return self.profile.ports

    def at_duty(self, duty: float) -> WorkloadCosts:
        """The same where attention is under way for a share `duty` of the time.

        Up to `COOL_DUTY` the pauses of communication leave the clock as it is for a call alone; from there to attention
        without a pause, the slowdown grows to what a block of nothing else shows.
        """
        hot = max(0.0, min(1.0, duty) - COOL_DUTY) / (1 - COOL_DUTY)
        return WorkloadCosts(self.profile, self.workload, graph=self.graph, sustained=self.sustained, hot=hot)

    def op_cost(self, op: Op, schedule: Schedule) -> OpCost:
        """Price one operation of `schedule`, whose cut adds up to this workload's M (or which is a ring)."""
        in_ring = schedule.name == "ring"
        size = min(op.chunk, 1) if in_ring else schedule.cut[op.chunk]  # a ring's steps are alike but for the first
        # One chunk on two lanes has nothing to overlap with.
        contends = len(schedule.cut) > 1 and self._contends(schedule)
        key = (op.kind, size, op.tensors, op.part, in_ring, contends, schedule.copies_apart, schedule.comm_sms)
        if key not in self._known:
            cost = self._ring_cost(op) if in_ring else self._chunk_cost(op, size, schedule)
            if contends:
                cost = replace(cost, lane_ms=cost.lane_ms * self._slowdown(op, in_ring))
            self._known[key] = cost
        return self._known[key]

    @cached_property
    def attention_ms(self) -> float:
        """Attention of all M heads in one call."""
        w = self.workload
        return self.profile.attention_ms(w.seq_len, w.heads_a_rank, w.batch, hot=self.hot)

    @cached_property
    def comm_ms(self) -> float:
        """All that Ulysses spends outside attention: four exchanges with their copies (on CUDA, without launches)."""
        schedule = serial((self.workload.heads_a_rank,), split_qkv=True)
        costs = [self.op_cost(op, schedule) for op in schedule.ops if op.kind != "attend"]
        return sum(c.lane_ms + c.finish_ms + (c.host_ms if self.host_computes else 0.0) for c in costs)

    @property
    def comm_ratio(self) -> float:
        """rho: the share of communication in Ulysses."""
        return self.comm_ms / (self.comm_ms + self.attention_ms)

    @property
    def wire_ratio(self) -> float:
        """rho from bytes over bandwidth alone: no latency, copy or launch, attention at a steady rate without waves."""
        w = self.workload
        latency_ms = self.profile.exchange_ms(0, w.ranks)
        wire_ms = self.profile.exchange_ms(w.off_rank(4 * w.tensor_bytes(w.heads_a_rank)), w.ranks) - latency_ms
        steady_ms = replace(self.profile, sms=None).attention_ms(w.seq_len, w.heads_a_rank, w.batch)
        return wire_ms / (wire_ms + steady_ms)

    def _contends(self, schedule: Schedule) -> bool:
        # What waits for attention's end runs beside none of it; an attention on fewer SMs is priced as that.
        own_sms = schedule.comm_sms and self.wire_needs_sms
        return schedule.overlaps and not own_sms and not self._blocked

    def _slowdown(self, op: Op, in_ring: bool) -> float:
        attention, communication = self._ring_slowdowns if in_ring else self._chunk_slowdowns
        return attention if op.kind == "attend" else communication

    @cached_property
    def _ring_slowdowns(self) -> tuple[float, float]:
        ops = ring(self.workload.ranks).ops
        rotate_ms, attend_ms = (
            sum(self._ring_cost(o).lane_ms for o in ops if o.kind == k) for k in ("rotate", "attend")
        )
        return self._slowdowns(attend_ms, rotate_ms)

    @cached_property
    def _chunk_slowdowns(self) -> tuple[float, float]:
        heads = self.workload.heads_a_rank
        comm_ms = sum(self._chunk_cost(Op(kind, 0, COMM), heads).lane_ms for kind in ("exchange", "return"))
        return self._slowdowns(self.attention_ms, comm_ms)

    def _slowdowns(self, attend_ms: float, comm_ms: float) -> tuple[float, float]:
        """Of attention and of communication."""
        p = self.profile
        attention_covered, comm_covered = (
            min(1.0, comm_ms / attend_ms),
            min(1.0, attend_ms / comm_ms) if comm_ms else 0.0,
        )
        return (
            1 + (p.attention_slowdown - 1) * attention_covered,
            1 + (p.communication_slowdown - 1) * comm_covered,
        )

    def _chunk_cost(self, op: Op, heads: int, schedule: Schedule | None = None) -> OpCost:
        """An operation with nothing beside it; where no schedule is given, of one that copies in its exchanges."""
        p, w = self.profile, self.workload
        apart = schedule is not None and schedule.copies_apart
        if op.kind == "attend":
            kept = schedule.comm_sms if schedule is not None else 0
            attend_ms = p.attention_ms(w.seq_len, heads, w.batch, parts=op.part[1], without_sms=kept, hot=self.hot)
            # On a CPU the call was measured with the host's part in it.
            return OpCost(attend_ms, 0.0 if self.host_computes else self._host_ms)
        if w.ranks == 1 and not apart:
            return OpCost(0.0, self._host_ms)
        copy_in_ms, wire_ms, copy_out_ms = self._moved_ms(op, heads)
        if op.kind in ("pack", "unpack"):
            return OpCost(copy_in_ms + copy_out_ms, 0.0 if self.host_computes else self._host_ms)
        if apart:
            # What arrived is copied heads first on a CPU, whoever packed.
            return OpCost(wire_ms, self._host_ms, copy_out_ms if op.kind == "exchange" else 0.0)
        if self.host_computes:
            return OpCost(wire_ms, self._host_ms + copy_in_ms, copy_out_ms)
        return OpCost(copy_in_ms + wire_ms + copy_out_ms, self._host_ms)

    @property
    def _host_ms(self) -> float:
        return 0.0 if self.graph else self.profile.host_ms

    def _moved_ms(self, op: Op, heads: int) -> tuple[float, float, float]:
        """Copying before, on the link, copying after: of an exchange or a return that makes its own copies, or of a
        `pack` or `unpack` the copying alone."""
        p, w = self.profile, self.workload
        share = 1 / op.part[1] if op.kind in ("return", "unpack") or op.tensors == "q" else 1.0
        tensors = {"exchange": len(op.tensors), "pack": 3}.get(op.kind, 1)
        gb = share * tensors * w.tensor_bytes(heads) / 1e9
        if op.kind == "pack":
            return gb * p.pack_ms_per_gb, 0.0, 0.0
        if op.kind == "unpack":
            return 0.0, 0.0, gb * p.unpack_ms_per_gb
        wire_ms = p.exchange_ms(w.off_rank(gb * 1e9), w.ranks)
        if op.kind == "exchange":
            arrange_ms = gb * p.unpack_ms_per_gb if self.host_computes and heads > 1 else 0.0
            return gb * p.pack_ms_per_gb, wire_ms, arrange_ms
        # A kernel's result of one batch entry is sent as it lies.
        return gb * p.pack_ms_per_gb if w.batch > 1 else 0.0, wire_ms, gb * p.unpack_ms_per_gb

    # ---- on a GPU, by what an operation occupies ---------------------------------------------------------------------

    @property
    def holds_sms(self) -> bool:
        return self.profile.holds_sms

    @property
    def wire_needs_sms(self) -> bool:
        return self.profile.wire_needs_sms

    @property
    def _blocked(self) -> bool:
        """Whether an exchange on shared SMs has to wait for attention's end."""
        return self.holds_sms and self.wire_needs_sms

    def host_ms(self, op: Op, schedule: Schedule) -> float:
        return self._host_ms

    def stages(self, op: Op, schedule: Schedule) -> tuple[Stage, ...]:
        """An operation as the stages that `contend` lets meet."""
        in_ring = schedule.name == "ring"
        size = min(op.chunk, 1) if in_ring else schedule.cut[op.chunk]
        fills = COMPUTE_2 in schedule.lanes
        key = (op.kind, size, op.tensors, op.part, in_ring, fills, schedule.overlaps, schedule.copies_apart)
        key = (*key, schedule.comm_sms)
        if key not in self._known_stages:
            self._known_stages[key] = self._stages_of(op, schedule, in_ring)
        return self._known_stages[key]

    def _stages_of(self, op: Op, schedule: Schedule, in_ring: bool) -> tuple[Stage, ...]:
        slowdown = self._slowdown(op, in_ring) if self._contends(schedule) else 1.0
        if op.kind == "attend":
            if in_ring:
                w, attend_ms = self.workload, self._ring_cost(op).lane_ms * slowdown
                last = self.profile.last_wave(w.seq_len // w.ranks, w.heads, w.batch)
                return (Stage("attend", attend_ms, attend_ms * last),)
            heads = schedule.cut[op.chunk]
            w, kept = self.workload, schedule.comm_sms
            attend_ms = self._chunk_cost(op, heads, schedule).lane_ms
            if COMPUTE_2 in schedule.lanes:  # what a chunk's last wave leaves idle, the next chunk's first takes
                share = heads / w.heads_a_rank / op.part[1]
                whole_ms = self._chunk_cost(Op("attend", 0, op.lane), w.heads_a_rank, schedule).lane_ms
                attend_ms = min(attend_ms, share * whole_ms) / min(1.0, self.profile.fill_speedup)
            attend_ms *= slowdown
            last = self.profile.last_wave(w.seq_len, heads, w.batch, parts=op.part[1], without_sms=kept)
            return (Stage("attend", attend_ms, attend_ms * last),)
        if op.kind == "rotate":
            copy_ms = self._ring_copy_ms if op.chunk == 0 else 0.0
            return (Stage("copy", copy_ms), Stage("wire", (self._ring_cost(op).lane_ms - copy_ms) * slowdown))
        copy_in_ms, wire_ms, copy_out_ms = self._moved_ms(op, schedule.cut[op.chunk])
        if schedule.copies_apart and op.kind in ("exchange", "return"):
            copy_in_ms = copy_out_ms = 0.0
        return (Stage("copy", copy_in_ms), Stage("wire", wire_ms * slowdown), Stage("copy", copy_out_ms))

    def _ring_cost(self, op: Op) -> OpCost:
        p, w = self.profile, self.workload
        local_tokens = w.seq_len // w.ranks
        elements = w.batch * local_tokens * w.heads * w.head_dim
        if op.kind == "attend":
            attend_ms = p.attention_ms(local_tokens, w.heads, w.batch, hot=self.hot) * p.lse_slowdown
            merge_ms = elements * 4 / 1e9 * p.merge_ms_per_gb
            return OpCost(attend_ms + merge_ms, 0.0 if self.host_computes else self._host_ms)
        wire_ms = p.rotate_ms(self._ring_bytes, w.ranks)
        copy_ms = self._ring_copy_ms if op.chunk == 0 else 0.0
        if self.host_computes:
            return OpCost(wire_ms, self._host_ms + copy_ms)
        return OpCost(copy_ms + wire_ms, self._host_ms)

    @property
    def _ring_bytes(self) -> int:
        """K and V of a rank."""
        w = self.workload
        return 2 * w.batch * (w.seq_len // w.ranks) * w.heads * w.head_dim * ITEMSIZE[w.dtype]

    @property
    def _ring_copy_ms(self) -> float:
        """Its own K and V, into the first buffer."""
        return self._ring_bytes / 1e9 * self.profile.pack_ms_per_gb


def predict(schedule: Schedule, costs: Costs) -> Timeline:
    """`simulate`, with exchanges and returns sharing one port where the costs say so (`ports`, 1 unless given).

    On a GPU whose attention holds every SM, and there for schedules that copy apart, it is `contend`. Where calls
    follow each other (`WorkloadCosts.sustained`), attention's clock is that of the share of time which it takes.

    On one port a third lane adds no bandwidth: both communication lanes are priced as one, in issue order.
    """
    timeline = _predict(schedule, costs)
    if isinstance(costs, WorkloadCosts) and costs.sustained and costs.profile.knows_sustained:
        hot = costs.hot
        for _ in range(_TURNS):
            costs = costs.at_duty(attending_ms(timeline) / timeline.duration_ms)
            if abs(costs.hot - hot) < _SETTLED:
                break
            timeline, hot = _predict(schedule, costs), costs.hot
    return timeline


def attending_ms(timeline: Timeline) -> float:
    """How long attention is under way, on whichever lane."""
    total_ms = until_ms = 0.0
    for span in sorted((s for s in timeline.spans if s.op.kind == "attend"), key=lambda s: s.begin_ms):
        total_ms += max(0.0, span.end_ms - max(span.begin_ms, until_ms))
        until_ms = max(until_ms, span.end_ms)
    return total_ms


def _predict(schedule: Schedule, costs: Costs) -> Timeline:
    gpu: Any = costs if hasattr(costs, "stages") and not costs.host_computes else None
    if gpu is not None and (schedule.copies_apart or gpu.holds_sms):
        return contend(schedule, gpu)
    if getattr(costs, "ports", 1) > 1 or COMM_OUT not in schedule.lanes:
        return simulate(schedule, costs)
    ops = tuple(replace(op, lane=COMM) if op.lane == COMM_OUT else op for op in schedule.ops)
    timeline = simulate(replace(schedule, ops=ops), costs)
    spans = tuple(Span(op, s.begin_ms, s.end_ms) for op, s in zip(schedule.ops, timeline.spans, strict=True))
    return Timeline(schedule, spans, timeline.duration_ms, timeline.source)
