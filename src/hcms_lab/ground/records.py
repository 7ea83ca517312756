"""One case, one line: the flat records that everything else is drawn from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from stat import S_ISREG
from typing import Any

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.paths import NAME
from hcms_lab.ground.private import scrubbed

SCHEMA = 1


@dataclass(kw_only=True)
class Record:
    """A measured or predicted case. What does not apply is null."""

    schema: int = SCHEMA
    exp: str
    status: str = "done"  # done | failed | out-of-memory | refused
    source: str = "measured"  # measured | predicted
    hardware: str
    workload: str
    link: str | None = None
    transport: str | None = None  # of our own methods, where it is not the group's collectives: copy-engine
    link_ratio: float | None = None  # the communication ratio that the emulated link was derived from
    link_gbps: float | None = None
    world_size: int
    method: str
    kernel: str | None = None
    dtype: str | None = None
    batch: int | None = None
    seq_len: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    cut: str | None = None
    schedule: str | None = None
    comm_ratio: float | None = None  # rho: of serial Ulysses in the same case
    comm_ms: float | None = None
    attention_ms: float | None = None
    latency_ms: float | None = None
    latency_iqr_ms: float | None = None
    times_ms: list[float] | None = None
    ceiling_ms: float | None = None
    speedup_vs_ulysses: float | None = None
    speedup_vs_ring: float | None = None
    hidden_fraction: float | None = None
    host_ms: float | None = None  # to issue a call
    load: str | None = None  # sustained (blocks of back-to-back calls) | rested (single calls)
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    peak_mem_gib: float | None = None
    max_abs_err: float | None = None
    bitwise_equal: bool | None = None
    ok: bool = True
    requested_path: str | None = None
    actual_path: str | None = None
    seed: int | None = None
    error: str | None = None
    frames: int | None = None
    prefetch: int | None = None
    n: int | None = None
    warmup: int | None = None
    latency_p95_ms: float | None = None
    buffer_gib: float | None = None
    kernel_max_abs_err: float | None = None  # the plain kernel's own error on one rank, beside max_abs_err
    predicted_ms: float | None = None
    plan_reason: str | None = None
    ranks_per_core: float | None = None
    version: str | None = None  # of a peer
    peer_kind: str | None = None  # ulysses | ring | other
    tflops: float | None = None  # of a kernel by itself
    gbps: float | None = None  # of a copy or a collective by itself, bytes read and written over time
    share_of_best: float | None = None  # of a kernel's rate at the most heads, or of a copy's ceiling


# What tells the cases of one file apart: `num_frames` is a clip's, `run` that of lines gathered from other runs.
CASE = (
    *("exp", "source", "hardware", "workload", "link", "link_ratio", "world_size", "method", "kernel", "dtype"),
    *("batch", "seq_len", "heads", "head_dim", "cut", "prefetch", "frames", "num_frames", "seed", "run"),
    *("transport", "load"),
)
FREE_TEXT = ("error", "plan_reason", "version")  # the rest is made of our own words
MAX_LINE_BYTES = 1 << 20  # a committed record has 3 kB at most; one of a thousand rounds would have 30
MAX_FILE_BYTES = 1 << 26
MOST = 1 << 53  # what a float holds as a whole number
_CUT = re.compile(r"(?:auto:)?[a-z]*:?[\w+-]+")


def plan(cut: str | None) -> str | None:
    """The cut that was asked for: `"auto:1-3-1"`, chosen on the machine, is `"auto"` on every machine."""
    return "auto" if isinstance(cut, str) and cut.startswith("auto") else cut


def case_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a record is of, whatever came of it."""
    return tuple(plan(row.get(name)) if name == "cut" else row.get(name) for name in CASE)


def repeated(rows: Iterable[Mapping[str, Any]]) -> int:
    """How many records are of a case that an earlier one is of."""
    cases = [case_of(row) for row in rows]
    return len(cases) - len(set(cases))


def derived_gbps(found: list[dict[str, Any]], ranks: int) -> dict[float, float]:
    """The bandwidth that each link ratio came to on so many ranks, for the run that goes on from these records."""
    return {
        r["link_ratio"]: r["link_gbps"]
        for r in found
        if r["world_size"] == ranks and r["link_ratio"] and r["link_gbps"]
    }


def read_bounded(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """A file's content, which others may have written: nothing larger than `limit` is read.

    Raises:
        UsageError: it is larger, cannot be read, or is no file but a folder, a pipe or a device.
    """
    if not S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise UsageError(f"{path} is no regular file: mend or remove it")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): mend or remove it") from None
    if len(content) > limit:
        raise UsageError(f"{path} has more than {limit / 2**20:g} MiB, which no run of ours writes: not read")
    return content


def parsed(text: bytes, where: str) -> Any:
    """JSON that others may have written, as plain data.

    Raises:
        UsageError: it is not JSON, holds NaN or Infinity, or nests too deep; begins with `where`.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if error.lineno > 1 else ""
        raise UsageError(f"{where}{line} is not JSON ({error.msg}): mend or remove it") from None
    except UnicodeDecodeError:
        raise UsageError(f"{where} is not UTF-8 text: mend or remove it") from None
    except ValueError as error:
        raise UsageError(f"{where} is not JSON ({str(error).splitlines()[0]}): mend or remove it") from None
    except RecursionError:
        raise UsageError(f"{where} nests too deep for a record: mend or remove it") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The records of a file, each checked to be one. A last line without its newline was cut short: it is left out.

    Raises:
        UsageError: the first line that is no record, by file and line, or a file that is too large.
    """
    rows = []
    for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise UsageError(
                f"{where} has {len(line) / 2**20:.1f} MiB, and a record has {MAX_LINE_BYTES >> 20} MiB at most"
            )
        row = parsed(line, where)
        if not isinstance(row, dict):
            raise UsageError(f"{where} is no record, but a {type(row).__name__}: mend or remove that line")
        rows.append(_checked(row, where))
    return rows


def _checked(row: dict[str, Any], where: str) -> dict[str, Any]:
    for name, value in row.items():
        kinds = _KINDS.get(name, (str, int, float) if name in CASE else None)
        if isinstance(value, int) and abs(value) > MOST:
            raise UsageError(f"{where}: {name} is a larger number than any of ours: mend or remove that line")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise UsageError(f"{where}: {name} holds half a character: mend or remove that line")
        if value is None or kinds is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = "text" if kinds == (str,) else "a list" if kinds == (list,) else "a truth value"
            wanted = "a number" if int in kinds else wanted
            wanted = "text or a number" if str in kinds and int in kinds else wanted
            raise UsageError(f"{where}: {name} is {str(value)[:40]!r}, and should be {wanted}")
        if name == "times_ms" and isinstance(value, list) and not all(isinstance(ms, int | float) for ms in value):
            raise UsageError(f"{where}: times_ms holds something that is not a number")
    if row.get("cut") is not None and not _CUT.fullmatch(row["cut"]):
        raise UsageError(f"{where}: cut is {row['cut'][:40]!r}, and should be as 1-3-1 or auto:1-3-1 is")
    for name in ("exp", "hardware"):  # parts of paths
        if row.get(name) is not None and not NAME.fullmatch(row[name]):
            raise UsageError(f"{where}: {name} is {row[name][:40]!r}, and should be a plain name, as fig3 is")
    return row


def _kinds(annotation: str) -> tuple[type, ...]:
    for begin, kinds in (("int", (int, float)), ("float", (int, float)), ("bool", (bool,)), ("list", (list,))):
        if annotation.startswith(begin):
            return kinds
    return (str,)


# pandas gives whole numbers back as floats, so a column of whole numbers may hold some.
_KINDS = {field.name: _kinds(str(field.type)) for field in fields(Record)}


def _whole_lines(path: Path) -> bytes:
    if path.is_symlink():
        raise UsageError(f"{path} is a link: put the file itself there")
    content = read_bounded(path) if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


class RecordFile:
    """Appends records to `records.jsonl` as cases finish, so that a run that dies keeps what it had.

    A record of a case that an earlier segment of the run left here takes that one's place, in one step with the rest
    of what is appended: at every moment the file holds the old record or the new one, never none or both. What an
    error's text tells of paths, names and secrets is taken out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._earlier: set[tuple[Any, ...]] | None = None  # cases that stood here before this object's first record

    def append(self, records: Iterable[Record | dict[str, Any]]) -> None:
        rows = [r if isinstance(r, dict) else asdict(r) for r in records]
        rows = [{**row, **scrubbed({name: row[name] for name in FREE_TEXT if row.get(name)})} for row in rows]
        texts = {i: json.dumps(row, allow_nan=False).encode() + b"\n" for i, row in enumerate(rows)}
        before = _whole_lines(self.path)
        if self._earlier is None:
            self._earlier = {case_of(row) for row in self.read()}
        again = {case: i for i, row in enumerate(rows) if (case := case_of(row)) in self._earlier}
        if not again and len(before) == (self.path.stat().st_size if self.path.exists() else 0):
            with self.path.open("ab") as file:  # buffered: a raw write of a full disk may be short without an error
                file.write(b"".join(texts.values()))
            return
        lines: list[bytes] = []
        for line in before.splitlines(keepends=True):
            case = case_of(json.loads(line)) if line.strip() else ()
            if case not in again:
                lines.append(line)
            elif again[case] in texts:
                lines.append(texts.pop(again[case]))
        self._replace(b"".join([*lines, *texts.values()]))
        self._earlier -= again.keys()

    def read(self) -> list[dict[str, Any]]:
        """The records so far."""
        return read_rows(self.path)

    def _replace(self, content: bytes) -> None:
        """In one step, so that a run that dies here loses nothing."""
        whole = self.path.with_suffix(".whole")
        with whole.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self.path)
