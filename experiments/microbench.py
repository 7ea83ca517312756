"""Micro-benchmarks of one attention layer: methods and cuts against each other over lengths, ranks, links, kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hcms.hardware import hardware
from hcms_lab.ground.config import CasesConfig, LayerConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.names import KERNELS, PEER
from hcms_lab.ground.records import RecordFile, derived_gbps
from hcms_lab.measure.cases import Point, device_of, link_of, points
from hcms_lab.report.terminal import Column, print_whole, width
from hcms_lab.report.terminal import table as fitted
from hcms_lab.report.words import short_cut

POINT = ("world_size", "seq_len", "kernel", "dtype")  # what tells the points of a table apart, with the link's ratio

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
    whole = grid(cfg)
    todo = _without(whole, found)

    from hcms.links import links
    from hcms_lab.measure.job import Job
    from hcms_lab.measure.launch import launch
    from hcms_lab.measure.progress import progress

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
                sweeps=len({(p.ranks, p.link_ratio) for p in whole}) > 1,
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
    print(f"link {link}: {links()[link].summary}")
    print_whole(table(found, f"{cfg.name}: {slug}, link {link}", width()), width())
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


def table(records: list[dict[str, Any]], title: str, limit: int) -> Table:
    """The terminal's table: a time never stands without its correctness. A refused point is one row.

    What is the same in all rows stands in the title. Where `limit` characters are too few, columns go: the spread
    first, then errors, Ring, the hidden share, bitwise and rho; methods, cuts, times, gains and the check stay. Peers,
    whose names are long, have no cut: beside them ours stands behind its method.
    """
    shown, refused = [], set()
    for r in records:
        if r["status"] == "refused":
            ratio = (r["world_size"], r["seq_len"], r["link_ratio"])
            if ratio in refused:
                continue
            refused.add(ratio)
            r = {**dict.fromkeys(r), **{k: r[k] for k in (*POINT, "link_ratio", "status")}, "method": "refused"}
            r |= {"comm_ratio": r["link_ratio"], "cut": "out of reach"}
        shown.append(r)
    if not shown:
        return fitted(title, [], limit)
    same = [key for key in POINT if len({r[key] for r in shown}) == 1]
    words = {"world_size": "{} ranks", "seq_len": "{:,} tokens", "kernel": "{}", "dtype": "{}"}
    title = ", ".join([title, *(words[key].format(shown[0][key]) for key in same)])
    heads = {"world_size": "ranks", "seq_len": "tokens", "kernel": "kernel", "dtype": "dtype"}
    columns = [
        Column(heads[key], [f"{r[key]:,}" if key == "seq_len" else str(r[key]) for r in shown], key in POINT[:2])
        for key in POINT
        if key not in same
    ]
    methods = [r["method"].removeprefix(PEER) for r in shown]
    cuts = [short_cut(r["cut"] or "-") for r in shown]
    if any(r["method"].startswith(PEER) for r in shown):
        methods = [method if cut == "-" else f"{method} {cut}" for method, cut in zip(methods, cuts, strict=True)]
        cuts = []
    columns += [
        _numbers("rho", "comm_ratio", ".3f", shown, rank=6),
        Column("method", methods),
        *([Column("cut", cuts)] if cuts else []),
        _numbers("latency\nms", "latency_ms", ".2f", shown),
        _numbers("± IQR\nms", "latency_iqr_ms", ".2f", shown, rank=1),
        _numbers("vs\nulysses", "speedup_vs_ulysses", ".3f", shown),
        _numbers("vs\nring", "speedup_vs_ring", ".3f", shown, rank=3),
        _numbers("hidden", "hidden_fraction", ".2f", shown, rank=4),
        _numbers("max\nerror", "max_abs_err", ".1e", shown, rank=2),
        Column("bitwise", [{True: "yes", False: "no", None: "-"}[r["bitwise_equal"]] for r in shown], rank=5),
        Column("check", [_check(r) for r in shown]),
    ]
    points = [(*(r[key] for key in POINT), r["link_ratio"]) for r in shown]
    ends = {i for i, (point, following) in enumerate(pairwise(points)) if point != following}
    columns = [column for column in columns if set(column.cells) != {"-"} or column.head == "cut"]
    return fitted(title, columns, limit, ends, box=SIMPLE_HEAD, padding=0)


def _numbers(head: str, key: str, form: str, records: list[dict[str, Any]], rank: int | None = None) -> Column:
    return Column(head, [_number(r[key], form) for r in records], right=True, rank=rank)


def _check(record: dict[str, Any]) -> str:
    if record["status"] == "refused":
        return "refused"
    return "ok" if record["ok"] and not record["error"] else record["status"] if record["error"] else "WRONG"


def reasons(records: list[dict[str, Any]]) -> list[str]:
    """Why cases failed, a line a method and reason."""
    failed = [r for r in records if r["error"] and r["status"] != "refused"]
    return list(dict.fromkeys(f"{r['status']}: {r['method']}: {r['error']}" for r in failed))
