"""Table 5: ours beside the libraries that one would pick instead, each against the fastest Ulysses of any peer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from hcms_lab.ground.names import PEER
from hcms_lab.report import parts
from hcms_lab.report.registry import register
from hcms_lab.report.stats import measured, overlapping, point_columns, ratio_of_medians

Case = Mapping[str, Any]
WHOLE = ("ulysses", "ulysses-packed")


@register("table5", "Ours beside other libraries")
def table5(records: pd.DataFrame) -> pd.DataFrame:
    """A column a point. First who leads there and by how much, then a row for every contestant.

    A contestant's cell is its median in ms and, in brackets, how many times as fast it is as the fastest Ulysses of any
    peer. `MiB` is its peak beyond the inputs at the longest sequence, `max error` the largest against float64, and
    `bitwise` compares with our serial Ulysses. One that could not take part has the reason in `check`.
    """
    good = measured(records)
    points = _points(good)
    lead_at = {label: _lead(point) for label, point in points.items()}
    names = dict.fromkeys(name for lead in lead_at.values() for name in lead)
    ahead = [{"": name} | {label: lead.get(name) for label, lead in lead_at.items()} for name in names]
    rows = [*ahead, *_contestants(_cases(records), points, good["seq_len"].max())]
    table = pd.DataFrame(rows, columns=["", "version", *points, "MiB", "max error", "bitwise", "check"])
    rounds = sorted({int(n) for n in good["n"]})
    table.attrs["caption"] = (
        f"{parts.where(good)}, {parts.layer(good, tokens=False)}. Medians of {' or '.join(map(str, rounds))} rounds in "
        f"which all contestants of a point were interleaved, of the slowest rank, in ms; in brackets, times as fast as "
        f"the fastest Ulysses of any peer. Leads are ratios of medians with 95 % intervals of a bootstrap over rounds. "
        f"ρ is measured in our serial Ulysses."
    )
    return table


def leads(records: pd.DataFrame) -> pd.DataFrame:
    """A row a point: who is ahead of whom there and by how much, without the contestants' own figures."""
    rows = []
    for point in _points(measured(records)).values():
        first = _cases(point)[0]
        ranks = int(first["world_size"])
        place = {
            "ranks": ranks,
            "heads a rank": int(first["heads"]) // ranks,
            "tokens": f"{int(first['seq_len']):,}",
            "ρ": f"{first['comm_ratio']:.2f}",
            "n": int(first["n"]),
        }
        rows.append(place | _lead(point))
    return pd.DataFrame(rows)


def _lead(point: pd.DataFrame) -> dict[str, str]:
    """Who is ahead of whom at a point, in words."""
    cases = _cases(point)
    peer, ring = (_fastest([c for c in cases if c["peer_kind"] == kind]) for kind in ("ulysses", "ring"))
    whole, auto = _fastest(cases, WHOLE.__contains__), _fastest([c for c in cases if _cut(c) == "auto"])
    chunked = _fastest([c for c in cases if _cut(c) != "auto"], overlapping().__contains__)
    lead = {"fastest peer Ulysses": _name(peer)} if peer else {}
    for row, ours, base in (
        ("our Ulysses over it", whole, peer),
        ("our best HCMS over it", chunked, peer),
        ("our auto over it", auto, peer),
        ("our best HCMS over the fastest peer ring", chunked, ring),
    ):
        if ours and base:
            against = f" / {_name(base)}" if base is ring else ""
            lead[row] = f"{_name(ours)}{against}: {_times(base, ours)}"
    if chunked and pd.notna(chunked["hidden_fraction"]):
        lead["communication that HCMS hides"] = f"{chunked['hidden_fraction']:.0%}".replace("%", " %")
    return lead


def _contestants(cases: list[Case], points: Mapping[str, pd.DataFrame], longest: int) -> list[dict[str, Any]]:
    cells: dict[tuple[str, str], dict[str, Any]] = {_key(case): {} for case in cases}
    for label, point in points.items():
        ran = _cases(point)
        base = _fastest([c for c in ran if c["peer_kind"] == "ulysses"])
        for case in ran:
            over = f" (×{base['latency_ms'] / case['latency_ms']:.2f})" if base else ""
            cells[_key(case)][label] = f"{case['latency_ms']:.1f}{over}"
    rows = []
    for key, cell in cells.items():
        its = [case for case in cases if _key(case) == key]
        ran = [case for case in its if pd.notna(case["latency_ms"])]
        errors = [case["max_abs_err"] for case in ran if pd.notna(case["max_abs_err"])]
        peaks_gib = [case["peak_mem_gib"] for case in ran if case["seq_len"] == longest]
        reasons = dict.fromkeys(re.sub(r"^\w+Error: ", "", case["error"]) for case in its if case["error"])
        rows.append(
            {"": _name(its[0])}
            | cell
            | {
                "version": next((case["version"] for case in ran if case["version"]), None),
                "MiB": f"{max(peaks_gib) * 1024:.1f}" if peaks_gib else None,
                "max error": f"{max(errors):.1e}" if errors else None,
                "bitwise": ("yes" if all(bool(case["bitwise_equal"]) for case in ran) else "no") if ran else None,
                "check": "; ".join(reasons) or ("ok" if all(bool(case["ok"]) for case in its) else "WRONG"),
            }
        )
    return rows


def _points(cases: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The points by label: ranks, lengths, ratios, each ascending."""
    several = {key: cases[key].nunique() > 1 for key in ("world_size", "heads", "link", "kernel")}
    labelled: list[tuple[Any, str, pd.DataFrame]] = []
    for _, point in cases.groupby(point_columns(cases), dropna=False, sort=False):
        first = _cases(point)[0]
        ranks, heads, tokens, rho = int(first["world_size"]), first["heads"], first["seq_len"], first["comm_ratio"]
        label = f"{int(tokens):,} tokens, ρ {rho:.2f}"
        if several["world_size"] or several["heads"]:
            label = f"{ranks} ranks of {int(heads) // ranks} heads, {label}"
        label = ", ".join([*(str(first[key]) for key in ("link", "kernel") if several[key]), label])
        if any(label == other for _, other, _ in labelled):  # two links that this length makes hardly a difference to
            label += f", {first['link_gbps']:.3g} GB/s"
        labelled.append(((ranks, heads, tokens, rho), label, point))
    return {label: point for _, label, point in sorted(labelled, key=lambda item: item[0])}


def _cases(table: pd.DataFrame) -> list[Case]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _cut(case: Case) -> str:
    """The cut as it was asked for: what `auto` chose differs from point to point, and is one contestant."""
    cut = case["cut"] or ""
    return "auto" if cut.startswith("auto") else cut


def _key(case: Case) -> tuple[str, str]:
    return case["method"], _cut(case)


def _name(case: Case) -> str:
    """`hcms 1-3-1`, `diffusers-ulysses`."""
    return f"{case['method'].removeprefix(PEER)} {_cut(case)}".strip()


def _fastest(cases: list[Case], wanted: Callable[[str], bool] = lambda method: True) -> Case | None:
    """The fastest case of the methods that `wanted` takes, or None where none ran."""
    return min((case for case in cases if wanted(case["method"])), key=lambda case: case["latency_ms"], default=None)


def _times(base: Case, case: Case) -> str:
    """How many times as fast as `base`, with its interval."""
    lead = ratio_of_medians(base["times_ms"], case["times_ms"])
    return f"×{lead.value:.3f} ({lead.low:.3f} to {lead.high:.3f})"
