"""Table 1: the paper's claims against our records. The rules of the verdicts stand in `paper_tables/claims.csv`.

Nothing is typed in: a number is read from the newest records of the claim's experiment, a verdict follows from its
rule, and a claim without records says so.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from hcms_lab.ground.load import newest_runs
from hcms_lab.ground.paths import ROOT
from hcms_lab.report.closed_form import speedup_limit, two_lane_speedup
from hcms_lab.report.parts import hardware_name
from hcms_lab.report.stats import RESAMPLES, Interval, fastest, interpolated, measured, rank_correlation, speedups

HOLDS, SHOWN, PART, FAILS = "holds", "mechanism shown", "in part", "does not hold"
UNTOLD = "cannot be told"
NOT_YET = "not run yet"
NONE = "–"
LITTLE = 0.10  # the least gain that the paper reports
LEAST_POINTS = 5  # of a correlation that shall be told
Z_95 = 1.96  # half the width of a normal distribution's 95 % interval, in standard deviations
Read = Callable[[str], list[pd.DataFrame]]
OURS = ("hcms", "hcms-3lane", "hcms-serial")


@dataclass(frozen=True)
class Claim:
    """A row of `claims.csv`. `low` and `high` are the numbers of its rule."""

    name: str
    statement: str
    paper: str
    condition: str
    source: str
    experiment: str
    low: float
    high: float
    rule: str


@dataclass(frozen=True)
class Finding:
    """What records say of a claim: the measured value in words, where, of how many rounds or cases, and the verdict."""

    measured: str = NOT_YET
    on: str = NONE
    n: str = NONE
    predicted: str = NONE
    verdict: str = NOT_YET


@cache
def claims(path: Path = ROOT / "paper_tables" / "claims.csv") -> dict[str, Claim]:
    """The claims by name, in the file's order."""

    def number(text: str) -> float:
        return float(text) if text else float("nan")

    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            Claim(*(number(v) if k in ("low", "high") else v for k, v in row.items()))  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]
    return {claim.name: claim for claim in rows}


def band(name: str) -> tuple[float, float]:
    """The range of gains that the paper reports for a claim, as shares."""
    claim = claims()[name]
    return claim.low, claim.high


def table1(read: Read = newest_runs) -> pd.DataFrame:
    """One row a claim: the paper's figure, ours measured and ours predicted, the verdict by its rule, the command.

    Args:
        read: gives the records of an experiment, a table each run; `committed_runs` leaves this machine's own out.
    """
    rows = []
    for claim in claims().values():
        found = FINDINGS[claim.name](claim, read)
        rows.append(
            {
                "": claim.name,
                "claim": claim.statement,
                "paper": claim.paper,
                "ours, measured": found.measured,
                "on": found.on,
                "n": found.n,
                "ours, predicted": found.predicted,
                "verdict": found.verdict,
                "command": f"`python experiments/run.py +exp={claim.experiment}`",
            }
        )
    table = pd.DataFrame(rows)
    table.attrs["caption"] = (
        "Gains are speed ratios less one, with 95 % bootstrap intervals in brackets. The rule of each verdict stands "
        "in paper_tables/claims.csv and was written before the runs. Mechanism shown: it holds on an emulated link, "
        "whose communication ratio is chosen, or for a small model; the paper's platforms were not at hand."
    )
    return table


def percent(share: float, digits: int = 1) -> str:
    """`+12.3 %`."""
    return f"{100 * share:+.{digits}f} %".replace("-", "−")


def _with_interval(found: Interval) -> str:
    if found.low != found.low:
        return percent(found.value - 1)
    return f"{percent(found.value - 1)} [{percent(found.low - 1)}, {percent(found.high - 1)}]"


def _is_emulated(cases: pd.DataFrame) -> bool:
    return bool((cases["link"] == "emulated").any())


def _place(cases: pd.DataFrame) -> str:
    """Where, on how many ranks, over which link at which measured ratio."""
    ranks = ", ".join(str(p) for p in sorted({int(p) for p in cases["world_size"]}))
    ratios = cases["comm_ratio"].dropna()
    low, high = (f"{x:.2f}" for x in (ratios.min(), ratios.max())) if len(ratios) else ("", "")
    rho = f", ρ = {low}" + (f" to {high}" if low != high else "") if low else ""
    shared = ", ranks share cores" if (cases["ranks_per_core"].fillna(1) > 1).any() else ""
    return f"{hardware_name(cases)}, {ranks} ranks, {cases['link'].iloc[0]} link{rho}{shared}"


def _rounds(cases: pd.DataFrame) -> str:
    low, high = int(cases["n"].min()), int(cases["n"].max())
    return str(low) if low == high else f"{low} to {high}"


def fixed_cuts(table: pd.DataFrame) -> pd.DataFrame:
    """Without the cuts that were chosen automatically, which are cases of their own."""
    kept = table[~table["cut"].fillna("").astype(str).str.startswith("auto")]
    kept.attrs = dict(table.attrs)
    return kept


def gains(table: pd.DataFrame, base: str) -> pd.DataFrame:
    """The fastest fixed cut's speedup over `base` at each point, with its interval."""
    best = fastest(speedups(fixed_cuts(table), base))
    best.attrs = dict(table.attrs)
    return best


def beyond_overlap(case: pd.Series) -> bool:
    """Whether a gain is surely above what hiding all communication would give, so that another cause has a part."""
    return float(case["speedup_low"]) > speedup_limit(float(case["comm_ratio"]))


def _interval(case: pd.Series) -> Interval:
    return Interval(float(case["speedup"]), float(case["speedup_low"]), float(case["speedup_high"]), int(case["n"]))


def _nearest(tables: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    """The group of cases nearest to the paper's setting: real links before emulated, then 4 ranks before others."""
    groups = [group for table in tables for _, group in table.groupby("world_size")]

    def distance(group: pd.DataFrame) -> tuple[bool, int]:
        return _is_emulated(group), abs(int(group["world_size"].iloc[0]) - 4)

    return min(groups, key=distance, default=None)


def _lengths(base: str) -> Callable[[Claim, Read], Finding]:
    """C1 and C2: over a baseline, at video lengths."""

    def find(claim: Claim, read: Read) -> Finding:
        predicted = _predicted_gains(base, read)
        found = _nearest([gains(table, base) for table in read(claim.experiment)])
        if found is None or found.empty:
            return Finding(predicted=predicted)
        found = found.sort_values("seq_len")
        ordered = found.sort_values("speedup")
        ends = dict.fromkeys(_with_interval(_interval(ordered.iloc[i])) for i in (0, -1))
        lengths = " to ".join(dict.fromkeys(f"{int(s):,}" for s in (found["seq_len"].min(), found["seq_len"].max())))
        if found["speedup"].median() - 1 >= claim.low and (found["speedup_low"] > 1).all():
            on_paper_terms = int(found["world_size"].iloc[0]) >= 4
            verdict = SHOWN if _is_emulated(found) else HOLDS if on_paper_terms else PART
        else:
            verdict = PART if (found["speedup_high"] - 1 >= claim.low).any() else FAILS
        return Finding(" to ".join(ends), f"{_place(found)}, {lengths} tokens", _rounds(found), predicted, verdict)

    return find


def _platforms(claim: Claim, read: Read) -> Finding:
    """C3: every hardware and rank count."""
    tables = [gains(table, "ulysses") for table in [*read("fig4"), *read("fig3")]]
    tables = [table for table in tables if not table.empty]
    predicted = _predicted_platforms(read)
    if not tables:
        return Finding(predicted=predicted)
    found = pd.concat([table.assign(name=hardware_name(table)) for table in tables], ignore_index=True)
    points = found.loc[found.groupby(["hardware", "link", "world_size"])["speedup"].idxmin()]
    above = found["speedup_low"] - 1 > claim.low
    on_gpus = points[points["link"] == "native"]
    counts = on_gpus.groupby("hardware")["world_size"].nunique()
    if not above.any():
        verdict = FAILS
    elif not above.all():
        verdict = PART
    elif on_gpus.empty:
        verdict = SHOWN
    else:
        verdict = HOLDS if len(counts) >= 2 and (counts >= 2).all() else PART
    several = points["name"].nunique() > 1
    each = [
        f"{case['name'] + ', ' if several else ''}{int(case['world_size'])} ranks: "
        f"{_with_interval(_interval(pd.Series(case)))}"
        for case in points.sort_values(["hardware", "world_size"]).to_dict("records")
    ]
    names = dict.fromkeys(_place(table) for table in tables)
    return Finding(f"least gain: {'; '.join(each)}", "; ".join(names), _rounds(points), predicted, verdict)


def _pipeline(ratio: str, interval: str) -> Callable[[Claim, Read], Finding]:
    """C4 and C5: columns of the records of whole clips."""

    def find(claim: Claim, read: Read) -> Finding:
        tables = [measured(fixed_cuts(table)) for table in read(claim.experiment)]
        tables = [table[table["method"] == "hcms"] for table in tables if ratio in table]
        found = _nearest([table[table[ratio].notna()] for table in tables])
        predicted = _predicted_clips(ratio, read)
        if found is None or found.empty:
            return Finding(predicted=predicted)
        best = found.sort_values(ratio).iloc[-1]
        low, high = best[interval]
        value = Interval(float(best[ratio]), float(low), float(high), int(best["n"]))
        full_size = int(best["head_dim"]) * int(best["heads"]) >= 3072 and not _is_emulated(found)
        if value.low <= 1:
            verdict = FAILS
        elif not full_size:
            verdict = SHOWN
        else:
            verdict = HOLDS if value.high - 1 >= claim.low else PART
        frames = f", {int(best['num_frames'])} frames" if "num_frames" in best else ""
        on = f"{_place(found)}, {best['workload']}{frames}"
        return Finding(_with_interval(value), on, str(value.n), predicted, verdict)

    return find


def ratio_gains(table: pd.DataFrame) -> pd.DataFrame:
    """The points of figure 5: the fastest fixed cut over Ulysses by measured ratio."""
    best = gains(table, "ulysses")
    return best[best["comm_ratio"].notna()].sort_values("comm_ratio")


def _correlation(claim: Claim, read: Read) -> Finding:
    """C6."""
    tables = [ratio_gains(table) for table in read(claim.experiment)]
    tables = [table for table in tables if len(table) >= 3]
    if not tables:
        return Finding()
    found = min(tables, key=_is_emulated)
    value = correlation_of_gains(found)
    verdict = UNTOLD if value.low != value.low else FAILS if value.low <= 0 else PART
    verdict = HOLDS if verdict == PART and value.value >= claim.low else verdict
    told = found[found["predicted_speedup"].notna()]
    predicted = NONE
    if len(told) >= 3:
        simulated = rank_correlation(told["comm_ratio"].tolist(), told["predicted_speedup"].tolist())
        predicted = f"Spearman {simulated:.2f} (simulator)"
    return Finding(
        correlation_in_words(value), _place(found), f"{value.n} ratios × {_rounds(found)} rounds", predicted, verdict
    )


def correlation_of_gains(points: pd.DataFrame) -> Interval:
    """Spearman's correlation of gain and ratio over the points of `ratio_gains`, with their own uncertainty.

    The interval is that of gains redrawn within theirs; fewer than five points, which chance alone orders every few
    dozen times, have none.
    """
    x, y = points["comm_ratio"].to_numpy(float), points["speedup"].to_numpy(float)
    value = rank_correlation(x, y)
    if len(x) < LEAST_POINTS:
        return Interval(value, float("nan"), float("nan"), len(x))
    spread = (points["speedup_high"] - points["speedup_low"]).to_numpy(float) / (2 * Z_95)
    drawn = np.random.default_rng(0).normal(y, np.nan_to_num(spread), size=(RESAMPLES, len(y)))
    low, high = np.percentile([rank_correlation(x, gains) for gains in drawn], [2.5, 97.5])
    return Interval(value, float(low), float(high), len(x))


def correlation_in_words(value: Interval) -> str:
    """`Spearman 0.98 [0.94, 1.00]`, without brackets where there is no interval."""
    interval = f" [{value.low:.2f}, {value.high:.2f}]" if value.low == value.low else ""
    return f"Spearman {value.value:.2f}{interval}".replace("-", "−")


def gain_at(points: pd.DataFrame, ratio: float) -> Interval | None:
    """The speedup at a ratio, read off between the measured points; None outside of them."""
    x = points["comm_ratio"].tolist()
    values = [interpolated(x, points[c].tolist(), ratio) for c in ("speedup", "speedup_low", "speedup_high")]
    if values[0] is None or values[1] is None or values[2] is None:
        return None
    return Interval(values[0], values[1], values[2], int(points["n"].min()))


def _thresholds(claim: Claim, read: Read) -> Finding:
    """C7."""
    predicted = ", ".join(
        f"{percent(two_lane_speedup(ratio, 5) - 1)} at {ratio:.0%}".replace("0%", "0 %")
        for ratio in (claim.low, claim.high)
    )
    predicted += " (closed form, five chunks)"
    tables = [ratio_gains(table) for table in read(claim.experiment)]
    tables = sorted((table for table in tables if len(table)), key=_is_emulated)
    for found in tables:
        low, high = gain_at(found, claim.low), gain_at(found, claim.high)
        if low is None or high is None:
            continue
        right = (low.value - 1 < LITTLE) + (high.value - 1 >= LITTLE)
        words = f"{_with_interval(low)} at {claim.low:.0%}, {_with_interval(high)} at {claim.high:.0%}"
        words = words.replace("0%", "0 %")
        return Finding(words, _place(found), _rounds(found), predicted, {2: HOLDS, 1: PART, 0: FAILS}[right])
    if tables:
        return Finding("the measured ratios do not reach from 10 to 20 %", _place(tables[0]), NONE, predicted, UNTOLD)
    return Finding(predicted=predicted)


def _equivalence(claim: Claim, read: Read) -> Finding:
    """C8."""
    tables = read(claim.experiment)
    if not tables:
        return Finding()
    found = pd.concat(tables)
    found = found[found["method"].isin(OURS) & (found["source"] == "measured") & (found["status"] != "refused")]
    uneven = found[[len(set(str(cut).split("-"))) > 1 for cut in found["cut"]]]
    if uneven.empty:
        return Finding()
    equal, right = int(uneven["bitwise_equal"].fillna(False).sum()), int(uneven["ok"].fillna(False).sum())
    verdict = HOLDS if equal == len(uneven) else PART if right == len(uneven) else FAILS
    kernels = ", ".join(sorted(set(uneven["kernel"])))
    ranks = ", ".join(str(p) for p in sorted({int(p) for p in uneven["world_size"]}))
    on = f"{'; '.join(dict.fromkeys(hardware_name(t) for t in tables))}, {ranks} ranks, {kernels}"
    words = f"{equal} of {len(uneven)} bitwise equal to Ulysses, largest error {uneven['max_abs_err'].max():.1e}"
    return Finding(words, on, f"{len(uneven)} cases", NONE, verdict)


def _kernels(claim: Claim, read: Read) -> Finding:
    """C9."""
    tables = read(claim.experiment)
    best = [gains(table, "ulysses") for table in tables]
    best = [table for table in best if not table.empty]
    if not best:
        return Finding()
    found = min(best, key=_is_emulated)
    wrong = any((~table["ok"].fillna(True)).any() for table in tables)
    gain = bool((found["speedup_low"] - 1 > claim.low).all())
    families = {str(kernel).split("-")[0] for kernel in found["kernel"]}
    verdict = FAILS if wrong or not gain else HOLDS if {"flash", "sdpa"} <= families else PART
    cases = found.sort_values("kernel").to_dict("records")
    words = "; ".join(
        f"{case['kernel']} {_with_interval(_interval(pd.Series(case)))}"
        + (" (more than overlap can give: smaller calls are faster)" if beyond_overlap(pd.Series(case)) else "")
        for case in cases
    )
    return Finding(words, _place(found), _rounds(found), NONE, verdict)


def predicted_layers(read: Read = newest_runs) -> pd.DataFrame:
    """Figure 6's predictions: a row a GPU type and length, with `over_ulysses` and `over_ring` as speedups."""
    for table in read("fig6"):
        told = table[(table["source"] == "predicted") & table["predicted_ms"].notna()]
        if len(told):
            keys = ["hardware", "link", "kernel", "world_size", "seq_len"]
            wide = told.pivot_table(index=keys, columns="method", values="predicted_ms").reset_index()
            return wide.assign(over_ulysses=wide["ulysses"] / wide["hcms"], over_ring=wide["ring"] / wide["hcms"])
    return pd.DataFrame()


def _predicted_gains(base: str, read: Read) -> str:
    told = predicted_layers(read)
    if told.empty:
        return NOT_YET
    values = told[f"over_{base}"] - 1
    types, ranks = told["hardware"].nunique(), int(told["world_size"].iloc[0])
    return f"{percent(values.min(), 0)} to {percent(values.max(), 0)} over {types} GPU types, {ranks} ranks"


def _predicted_clips(ratio: str, read: Read) -> str:
    """Table 4's predictions for whole clips on 4 GPUs, or on as many as there are."""
    for table in read("table4"):
        told = table[(table["source"] == "predicted") & (table["method"] == "hcms")]
        told = told[told["world_size"] == 4] if (told["world_size"] == 4).any() else told
        values = told[ratio].dropna().astype(float) - 1
        if len(values):
            types, ranks = told["hardware"].nunique(), int(told["world_size"].iloc[0])
            return f"{percent(values.min(), 0)} to {percent(values.max(), 0)} over {types} GPU types, {ranks} ranks"
    return NOT_YET


def _predicted_platforms(read: Read) -> str:
    told = predicted_layers(read)
    if told.empty:
        return NOT_YET
    best = told.groupby("hardware")["over_ulysses"].max()
    return f"{int((best - 1 >= LITTLE).sum())} of {len(best)} GPU types gain 10 % or more"


FINDINGS: dict[str, Callable[[Claim, Read], Finding]] = {
    "C1": _lengths("ulysses"),
    "C2": _lengths("ring"),
    "C3": _platforms,
    "C4": _pipeline("speedup_vs_ulysses", "speedup_interval"),
    "C5": _pipeline("attention_speedup_vs_ulysses", "attention_speedup_interval"),
    "C6": _correlation,
    "C7": _thresholds,
    "C8": _equivalence,
    "C9": _kernels,
}
