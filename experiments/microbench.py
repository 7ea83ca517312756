"""Micro-benchmarks of one attention layer: methods and cuts against each other over lengths, ranks, links, kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hcms.hardware import hardware
from hcms_lab.ground.config import CasesConfig, LayerConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.names import KERNELS, PEER
from hcms_lab.ground.records import RecordFile, derived_gbps
from hcms_lab.measure.cases import Point, device_of, link_of, points
from hcms_lab.measure.progress import progress

ALL = "all"  # of kernels: every one that can run here


@dataclass
class Settings(LayerConfig, CasesConfig):
    kind: str = "microbench"


def grid(cfg: Settings) -> list[Point]:
    """The points to be measured; `kernels=[all]` is every kernel that can run here, ring left out where it cannot."""
    if cfg.kernels != [ALL]:
        return points(cfg)
    wanted = points(replace(cfg, kernels=list(KERNELS)))  # refuses what it can before torch is imported
    import torch

    from hcms.kernels import kernel

    device, taken = device_of(cfg), []
    for point in wanted:
        k = kernel(point.kernel)
        cases = tuple(c for c in point.cases if c.method != "ring" or k.gives_lse)
        if cases and k.refusal(getattr(torch, point.dtype), point.head_dim, device) is None:
            taken.append(replace(point, cases=cases))
    if not taken:
        raise UsageError(
            f"kernels=[{ALL}]: none can run here with workload.dtype={cfg.workload.dtype} and "
            f"workload.head_dim={cfg.workload.head_dim}; give kernels=[sdpa] to see why"
        )
    return taken


def validate(cfg: Settings) -> None:
    """Refuse what could not run, kernels included, before any rank starts."""
    wanted = grid(cfg)
    import torch

    from hcms.kernels import kernel

    device = device_of(cfg)
    for point in wanted:
        attention = kernel(point.kernel)
        if refusal := attention.refusal(getattr(torch, point.dtype), point.head_dim, device):
            raise UsageError(f"kernels={point.kernel}: {refusal}")
        if any(case.method == "ring" for case in point.cases) and not attention.gives_lse:
            raise UsageError(
                f"kernels={point.kernel}: gives no log-sum-exp, which ring needs; take ring out of methods"
            )


def run(cfg: Settings, folder: Path) -> bool:
    """Measure every point that the folder's records do not hold yet; print the table; True if all is ok."""
    file = RecordFile(folder / "records.jsonl")
    found = file.read()
    todo = _without(grid(cfg), found)
    again = {_key(point) for point in todo}
    file.drop(lambda record: _key_of(record) in again)  # first: the W&B mirror reads the file from its first second on

    from hcms_lab.measure.job import Job
    from hcms_lab.measure.launch import launch

    device, link = device_of(cfg), link_of(cfg)
    slug = hardware(device).slug
    with progress(len(todo) * cfg.bench.iterations, cfg.name) as (ticks, show):
        for ranks, group in groupby(todo, key=lambda p: p.ranks):
            job = Job.of(
                cfg,
                ranks,
                tuple(group),
                folder,
                gbps_of_ratio=derived_gbps(found, ranks),
                sweeps=len({(p.ranks, p.link_ratio) for p in todo}) > 1,
            )
            launch(
                _on_rank,
                ranks,
                job,
                ticks,
                device=device,
                link=link,
                folder=folder,
                poll=show,
                timeout_s=cfg.bench.timeout_s,
            )
    found = file.read()
    shown, console = table(found, f"{cfg.name}: {slug}, link {link}"), Console()
    # Numbers are never cut: a narrow terminal wraps lines, a pipe gets the table's own width.
    Console(width=max(console.width, Console(width=1000).measure(shown).maximum)).print(shown)
    for line in reasons(found):
        print(line)
    return bool(found) and all(r["ok"] for r in found)


def _on_rank(rank: Any, job: Any, ticks: Any) -> None:
    from hcms_lab.measure.measure import measure

    measure(rank, job, ticks.put)


def _without(todo: list[Point], found: list[dict[str, Any]]) -> list[Point]:
    """The points of which a case is not recorded yet (`resume`)."""
    # An automatic cut is recorded with what it came to: "auto:1-3-1".
    # A peer that could not take part is done with, too: its row says why.
    have = {
        (_key_of(r), r["method"], r["cut"] and r["cut"].split(":")[0])
        for r in found
        if r["status"] == "done" or (r["ok"] and r["method"].startswith(PEER))
    }
    return [p for p in todo if not all((_key(p), c.method, c.cut) in have for c in p.cases)]


def _key(p: Point) -> tuple[Any, ...]:
    """What tells the points of one run apart."""
    return p.ranks, p.seq_len, p.kernel, p.dtype, p.link_ratio


def _key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("world_size", "seq_len", "kernel", "dtype", "link_ratio"))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(records: list[dict[str, Any]], title: str) -> Table:
    """The terminal's table: a time never stands without its correctness. A refused point is one row."""
    shown = Table(title=title)
    for column in ("ranks", "tokens", "rho"):
        shown.add_column(column, justify="right")
    varied = [key for key in ("kernel", "dtype") if len({r[key] for r in records}) > 1]
    for column in (*varied, "method", "cut"):
        shown.add_column(column, no_wrap=True)
    for column in ("latency ms", "± IQR", "vs ulysses", "vs ring", "hidden", "max err"):
        shown.add_column(column, justify="right")
    for column in ("bitwise", "check"):
        shown.add_column(column)
    last = None
    refused = set()
    for r in records:
        if r["status"] == "refused":
            ratio = (r["world_size"], r["seq_len"], r["link_ratio"])
            if ratio not in refused:
                refused.add(ratio)
                shown.add_section()
                shown.add_row(str(ratio[0]), f"{ratio[1]:,}", _number(ratio[2], ".3f"), "refused: out of reach here")
            continue
        point = (r["world_size"], r["seq_len"], r["link_ratio"], r["kernel"], r["dtype"])
        if last is not None and point != last:
            shown.add_section()
        last = point
        shown.add_row(
            str(r["world_size"]),
            f"{r['seq_len']:,}",
            _number(r["comm_ratio"], ".3f"),
            *(str(r[key]) for key in varied),
            r["method"],
            r["cut"] or "-",
            _number(r["latency_ms"], ".2f"),
            _number(r["latency_iqr_ms"], ".2f"),
            _number(r["speedup_vs_ulysses"], ".3f"),
            _number(r["speedup_vs_ring"], ".3f"),
            _number(r["hidden_fraction"], ".2f"),
            _number(r["max_abs_err"], ".1e"),
            {True: "yes", False: "no", None: "-"}[r["bitwise_equal"]],
            "ok" if r["ok"] and not r["error"] else r["status"] if r["error"] else "WRONG",
        )
    return shown


def reasons(records: list[dict[str, Any]]) -> list[str]:
    """Why cases failed, a line a method and reason."""
    failed = [r for r in records if r["error"] and r["status"] != "refused"]
    return list(dict.fromkeys(f"{r['status']}: {r['method']}: {r['error']}" for r in failed))
