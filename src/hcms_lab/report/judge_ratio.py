"""C6 and C7: how the gain goes with the communication ratio.

Gain and ratio never share a measurement, since noise in one Ulysses time would tie them together: a point's ratio is
the one that its link was set to, or else it comes from the even rounds and the gain from the odd ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from hcms_lab.report.claims import Claim
from hcms_lab.report.closed_form import two_lane_speedup
from hcms_lab.report.evidence import (
    NONE,
    Evidence,
    Finding,
    Outcome,
    Read,
    by_place,
    grade_of,
    ordered,
    over,
    place,
    rounds,
)
from hcms_lab.report.stats import (
    POINT,
    RESAMPLES,
    Interval,
    fixed_cuts,
    gains,
    interpolated,
    measured,
    overlapping,
    pick,
    point_columns,
    rank_correlation,
    rank_correlations,
    ratio_of_medians,
)
from hcms_lab.report.words import gain, percent

LITTLE = 0.10  # the least gain that the paper reports
LEAST_POINTS = 5  # of a correlation that shall be told
Z_95 = 1.96  # half the width of a normal distribution's 95 % interval, in standard deviations
SWEEP = [column for column in POINT if column not in ("link_ratio", "seq_len")]  # what a sweep of ratios holds fixed


def ratio_gains(table: pd.DataFrame) -> pd.DataFrame:
    """The points of figure 5, as `gains` has them, with `ratio` beside each gain and independent of it."""
    set_by_link = table[table["link_ratio"].notna()]
    points = gains(set_by_link, "ulysses")
    rows = [points.assign(ratio=points["link_ratio"].astype(float))]
    cases = measured(fixed_cuts(table[table["link_ratio"].isna()]))
    split = [_split(point) for _, point in cases.groupby(point_columns(cases), dropna=False, sort=False)]
    rows.append(pd.DataFrame([case for case in split if case is not None]))
    together = pd.concat([part for part in rows if len(part)], ignore_index=True) if any(map(len, rows)) else rows[0]
    together.attrs = dict(table.attrs)
    return together.sort_values("ratio", ignore_index=True)


def _split(point: pd.DataFrame) -> dict[Any, Any] | None:
    """A point whose ratio was not set: ratio and best cut from the even rounds, the gain from the odd ones."""
    by_method = {str(method): cases for method, cases in point.groupby("method", sort=False)}
    ours = point[point["method"].isin(overlapping())]
    if "ulysses" not in by_method or ours.empty:
        return None
    serial = by_method["ulysses"].iloc[0]
    n = min([len(serial["times_ms"]), *(len(times) for times in ours["times_ms"])])
    even = np.arange(n) % 2 == 0
    if n < 4 or pd.isna(serial["attention_ms"]):
        return None
    serial_ms = np.array(serial["times_ms"][:n], dtype=float)
    attention_ms = float(serial["attention_ms"])
    if "ceiling" in by_method and len(by_method["ceiling"].iloc[0]["times_ms"]) >= n:
        attention_ms = float(np.median(np.array(by_method["ceiling"].iloc[0]["times_ms"][:n])[even]))
    ratio = 1 - attention_ms / float(np.median(serial_ms[even]))
    times_ms = np.array([times[:n] for times in ours["times_ms"]], dtype=float)
    case = ours.iloc[pick(times_ms, even)]
    interval = ratio_of_medians(serial_ms[~even], np.array(case["times_ms"][:n])[~even])
    gained = {"speedup": interval.value, "speedup_low": interval.low, "speedup_high": interval.high}
    predicted = {"predicted_speedup": serial["predicted_ms"] / case["predicted_ms"]}
    return {**case.to_dict(), "n": interval.n, **gained, **predicted, "ratio": ratio}


def correlation(claim: Claim, read: Read) -> Finding:
    """C6."""
    predicted: list[str] = []

    def judge(points: pd.DataFrame) -> tuple[Outcome, str, str] | None:
        if len(points) < 3:
            return None
        value = correlation_of_gains(points)
        outcome: Outcome = "untold" if value.low != value.low else "fails" if value.low <= 0 else "part"
        outcome = "holds" if outcome == "part" and value.value >= claim.low else outcome
        simulated = points[points["predicted_speedup"].notna()]
        if len(simulated) >= 3:
            rho = rank_correlation(simulated["ratio"].tolist(), simulated["predicted_speedup"].tolist())
            predicted.append(f"Spearman {rho:.2f} (simulator)")
        return outcome, f"{correlation_in_words(value)} over {value.n} ratios", f"Spearman {value.value:.2f}"

    finding = _of_sweeps(claim, read, judge)
    return Finding(finding.evidence, next(iter(predicted), NONE), finding.at_most_part)


def thresholds(claim: Claim, read: Read) -> Finding:
    """C7."""

    def judge(points: pd.DataFrame) -> tuple[Outcome, str, str]:
        low, high = gain_at(points, claim.low), gain_at(points, claim.high)
        if low is None or high is None:
            words = f"the ratios do not reach from {_at(claim.low)} to {_at(claim.high)}"
            return "untold", words, words
        right = (low.value - 1 < LITTLE) + (high.value - 1 >= LITTLE)
        outcomes: dict[int, Outcome] = {2: "holds", 1: "part", 0: "fails"}
        words = f"{gain(low)} at {_at(claim.low)}, {gain(high)} at {_at(claim.high)}"
        short = f"{percent(low.value - 1)} at {_at(claim.low)}, {percent(high.value - 1)} at {_at(claim.high)}"
        return outcomes[right], words, short

    finding = _of_sweeps(claim, read, judge)
    bounds = ", ".join(f"{percent(two_lane_speedup(at, 5) - 1)} at {_at(at)}" for at in (claim.low, claim.high))
    return Finding(finding.evidence, f"{bounds} (closed form, five chunks)", finding.at_most_part)


def _of_sweeps(claim: Claim, read: Read, judge: Callable[[pd.DataFrame], tuple[Outcome, str, str] | None]) -> Finding:
    """Each hardware's and link's longest sweep judged; for the best grade to hold there must be two of something."""
    evidence, lengths = [], {}
    for cases in by_place(ratio_gains(table) for table in read(claim.experiment)):
        sweeps = [points for _, points in cases.groupby(SWEEP, dropna=False, sort=False)]
        points = max(sweeps, key=len)
        judged = judge(points)
        if judged is None:
            continue
        outcome, words, short = judged
        name, link = str(points["name"].iloc[0]), over(points)
        item = Evidence(grade_of(points), outcome, name, link, words, short, place(points), rounds(points))
        evidence.append(item)
        lengths[item] = set(points["seq_len"])
    finding = Finding(ordered(evidence))
    several = len({e.hardware for e in finding.best}) > 1 or len(set().union(*(lengths[e] for e in finding.best))) > 1
    return Finding(finding.evidence, at_most_part="" if several else "two hardware types or two lengths")


def correlation_of_gains(points: pd.DataFrame) -> Interval:
    """Spearman's correlation of gain and ratio over the points of `ratio_gains`, with their own uncertainty.

    The interval is that of gains redrawn within theirs; fewer than five points, which chance alone orders every few
    dozen times, have none.
    """
    x, y = points["ratio"].to_numpy(float), points["speedup"].to_numpy(float)
    value = rank_correlation(x, y)
    if len(x) < LEAST_POINTS:
        return Interval(value, float("nan"), float("nan"), len(x))
    spread = (points["speedup_high"] - points["speedup_low"]).to_numpy(float) / (2 * Z_95)
    drawn = np.random.default_rng(0).normal(y, np.nan_to_num(spread), size=(RESAMPLES, len(y)))
    low, high = np.percentile(rank_correlations(x, drawn), [2.5, 97.5])
    return Interval(value, float(low), float(high), len(x))


def correlation_in_words(value: Interval) -> str:
    """`Spearman 0.98 [0.94, 1.00]`, without brackets where there is no interval."""
    interval = f" [{value.low:.2f}, {value.high:.2f}]" if value.low == value.low else ""
    return f"Spearman {value.value:.2f}{interval}".replace("-", "−")


def gain_at(points: pd.DataFrame, ratio: float, column: str = "ratio") -> Interval | None:
    """The speedup at a ratio, read off between the points; None outside of them."""
    x = points[column].tolist()
    values = [interpolated(x, points[c].tolist(), ratio) for c in ("speedup", "speedup_low", "speedup_high")]
    if values[0] is None or values[1] is None or values[2] is None:
        return None
    return Interval(values[0], values[1], values[2], int(points["n"].min()))


def _at(ratio: float) -> str:
    return f"{100 * ratio:.0f} %"
