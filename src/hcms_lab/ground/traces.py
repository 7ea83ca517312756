"""The traces of a run: what a case's is called, how it is written and found, and a Chrome trace as a Timeline again.

A name is made of the case's own record, so whoever holds the record finds the trace.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hcms.schedule.schedule import Op, Schedule
from hcms.schedule.timeline import Span, Timeline
from hcms_lab.ground.cuts import recorded_cut
from hcms_lab.ground.records import Record

FOLDER = "traces"  # in a run's folder
PREDICTED = "predicted"  # in FOLDER: what the simulator made of the same case, from the run's own calibration
_OF_AN_OP = {field.name for field in fields(Op)} - {"kind", "chunk", "lane"}


def name(record: Mapping[Any, Any]) -> str:
    """The file name of a case's trace: `hcms-auto-1-3-1-2x3840-sdpa-float32-rho0.25.json`."""
    case = (_cut(record), _shape(record), record["kernel"], record["dtype"], _given(record, "transport"))
    words = [str(word) for word in (record["method"], *case) if word is not None]
    return "-".join([*words, *_ratio(record)]).replace(":", "-") + ".json"


def write(timeline: Timeline, folder: Path, record: Record) -> Path:
    """Write a case's timeline into the run's folder; the record's shape, cut and kernel must be filled in."""
    inside = PREDICTED if timeline.source == "predicted" else "."
    path = folder / FOLDER / inside / name(asdict(record))
    timeline.to_chrome_trace(path)
    return path


def find(folder: Path, record: Mapping[Any, Any]) -> Path | None:
    """The trace of a case in a run's folder, or None where there is none.

    Older runs numbered their traces, left the kernel out and told an automatic cut by what it came to.
    """
    path = folder / FOLDER / name(record)
    if path.is_file():
        return path
    cut = re.escape(_cut(record).removeprefix("auto:")) if _given(record, "cut") else r"(whole|\d+)"
    kernel = re.escape(f"-{record['kernel']}-{record['dtype']}")
    words = "-".join([re.escape(str(record["method"])), cut, _shape(record)])
    older = re.compile(rf"\d+-{words}({kernel})?{''.join('-' + re.escape(ratio) for ratio in _ratio(record))}\.json")
    return next((p for p in sorted((folder / FOLDER).glob("*.json")) if older.fullmatch(p.name)), None)


def find_predicted(folder: Path, record: Mapping[Any, Any]) -> Path | None:
    """The simulator's trace of a case, or None where the run predicted nothing or is older than such traces."""
    path = folder / FOLDER / PREDICTED / name(record)
    return path if path.is_file() else None


def read(path: Path, record: Mapping[Any, Any]) -> Timeline:
    """A case's Timeline, its Schedule rebuilt from what the trace and the record say."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = []
    for event in (event for event in events if event["ph"] == "X"):
        kind, chunk, *_ = event["name"].split()
        rest: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in event["args"].items() if key in _OF_AN_OP
        }
        op = Op(kind, int(chunk), lanes[event["tid"]], **rest)
        spans.append(Span(op, event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3))
    schedule = Schedule(str(record["schedule"]), _heads(record), tuple(span.op for span in spans))
    source = "predicted" if path.parent.name == PREDICTED else "measured"
    return Timeline(schedule, tuple(spans), max(span.end_ms for span in spans), source)


def _given(record: Mapping[Any, Any], field: str) -> Any:
    """A field's value, or None where the record has none (a table of records says NaN)."""
    value = record.get(field)
    return None if value is None or value != value else value


def _cut(record: Mapping[Any, Any]) -> str:
    return str(_given(record, "cut") or "whole")


def _shape(record: Mapping[Any, Any]) -> str:
    return f"{int(record['world_size'])}x{int(record['seq_len'])}"


def _ratio(record: Mapping[Any, Any]) -> list[str]:
    ratio = _given(record, "link_ratio")
    return [] if ratio is None else [f"rho{ratio:g}"]


def _heads(record: Mapping[Any, Any]) -> tuple[int, ...]:
    """The heads of each chunk; of a ring, a step each."""
    ranks = int(record["world_size"])
    if record["schedule"] == "ring":
        return (1,) * ranks
    cut = _given(record, "cut")
    if cut is None:
        return (int(record["heads"]) // ranks,)
    return recorded_cut(str(cut))
