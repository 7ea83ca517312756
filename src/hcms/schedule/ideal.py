"""What operations cost on an ideal machine: what theory says, and what a measurement is held against."""

from __future__ import annotations

from dataclasses import dataclass

from hcms.schedule.contend import Stage
from hcms.schedule.schedule import Op, Schedule
from hcms.schedule.simulate import OpCost


@dataclass(frozen=True, slots=True)
class IdealCosts:
    """Costs on an ideal machine: everything in proportion to heads, nothing for launches, latency or copies.

    Args:
        comm_ratio: rho of serial Ulysses.
        ranks: P, for a ring.
        attention_ms: attention of all of a rank's heads.
    """

    comm_ratio: float
    ranks: int = 2
    attention_ms: float = 1.0
    ports: int = 1
    host_computes: bool = False

    @property
    def comm_ms(self) -> float:
        return self.attention_ms * self.comm_ratio / (1 - self.comm_ratio)

    @property
    def holds_sms(self) -> bool:
        return False

    @property
    def wire_needs_sms(self) -> bool:
        return False

    def host_ms(self, op: Op, schedule: Schedule) -> float:
        return 0.0

    def stages(self, op: Op, schedule: Schedule) -> tuple[Stage, ...]:
        """What `contend` lets meet: attention on two lanes takes turns, two wires share the link."""
        kind = "attend" if op.kind == "attend" else "nothing" if op.kind in ("pack", "unpack") else "wire"
        return (Stage(kind, self.op_cost(op, schedule).lane_ms),)

    def op_cost(self, op: Op, schedule: Schedule) -> OpCost:
        if op.kind == "rotate":
            return OpCost(self.comm_ms * self.ranks / 2 / (self.ranks - 1))
        if op.kind in ("pack", "unpack"):
            return OpCost(0.0)
        share = schedule.cut[op.chunk] / sum(schedule.cut)
        if op.kind in ("attend", "return") or op.tensors == "q":
            share /= op.part[1]
        if op.kind == "attend":
            return OpCost(self.attention_ms * share)
        return OpCost(self.comm_ms * share * (len(op.tensors) if op.kind == "exchange" else 1) / 4)
