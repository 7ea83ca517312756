"""When each operation of a schedule ran: the one type that measured and simulated runs both yield."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hcms.schedule.schedule import COMPUTE, Op, Schedule


@dataclass(frozen=True, slots=True)
class Span:
    """An operation with its begin and end, in ms since the call began."""

    op: Op
    begin_ms: float
    end_ms: float

    @property
    def duration_ms(self) -> float:
        return self.end_ms - self.begin_ms


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of one call on one rank, in issue order, with the call's own duration in ms.

    `source` says whether the spans were `measured` or come from the simulator (`predicted`).
    """

    schedule: Schedule
    spans: tuple[Span, ...]
    duration_ms: float
    source: Literal["measured", "predicted"]

    @property
    def attention_ms(self) -> float:
        """Time with local attention under way (two lanes that attend at once count once)."""
        return self._busy_ms([s for s in self.spans if s.op.kind == "attend"])

    @property
    def communication_ms(self) -> float:
        """Time with at least one exchange, return, rotation or copy under way (overlapping spans count once)."""
        return self._busy_ms([s for s in self.spans if s.op.kind != "attend"])

    @staticmethod
    def _busy_ms(spans: list[Span]) -> float:
        busy_ms, reach_ms = 0.0, float("-inf")
        for span in sorted(spans, key=lambda s: s.begin_ms):
            busy_ms += max(0.0, span.end_ms - max(span.begin_ms, reach_ms))
            reach_ms = max(reach_ms, span.end_ms)
        return busy_ms

    def to_chrome_trace(self, path: Path, *, rank: int = 0) -> None:
        """Write the spans as a Chrome trace (chrome://tracing, Perfetto), lanes as threads, times in µs."""
        lanes = {lane: i for i, lane in enumerate((COMPUTE, *(x for x in self.schedule.lanes if x != COMPUTE)))}
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": lane}}
            for lane, tid in lanes.items()
        ]
        events += [
            {
                "ph": "X",
                "name": f"{span.op.kind} {span.op.chunk}",
                "cat": self.source,
                "pid": rank,
                "tid": lanes[span.op.lane],
                "ts": span.begin_ms * 1e3,
                "dur": span.duration_ms * 1e3,
                "args": {"tensors": span.op.tensors, "after": list(span.op.after), "part": list(span.op.part)},
            }
            for span in self.spans
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
