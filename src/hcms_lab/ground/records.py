"""One case, one line: the flat records that everything else is drawn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    transport: str | None = None  # collective | copy-engine
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


def derived_gbps(found: list[dict[str, Any]], ranks: int) -> dict[float, float]:
    """The bandwidth that each link ratio came to on so many ranks, for the run that goes on from these records."""
    return {
        r["link_ratio"]: r["link_gbps"]
        for r in found
        if r["world_size"] == ranks and r["link_ratio"] and r["link_gbps"]
    }


class RecordFile:
    """Appends records to `records.jsonl` as cases finish, so that a run that dies keeps what it had.

    A last line without its newline was cut short by a crash: it is left out, and gone with the next write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: list[Record]) -> None:
        before = self._whole_lines()
        if self.path.exists() and len(before) < self.path.stat().st_size:
            self._replace(before)
        with self.path.open("a") as file:
            for record in records:
                file.write(json.dumps(asdict(record), allow_nan=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The records so far."""
        return [json.loads(line) for line in self._whole_lines().splitlines()]

    def drop(self, these: Callable[[dict[str, Any]], bool]) -> None:
        """Take out the records that are to be measured again."""
        lines = self._whole_lines().splitlines(keepends=True)
        kept = [line for line in lines if not these(json.loads(line))]
        if len(kept) < len(lines):
            self._replace(b"".join(kept))

    def _whole_lines(self) -> bytes:
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def _replace(self, content: bytes) -> None:
        """In one step, so that a run that dies here loses nothing."""
        whole = self.path.with_suffix(".whole")
        whole.write_bytes(content)
        whole.replace(self.path)
