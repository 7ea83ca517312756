"""Intervals for what records say: speedups by paired bootstrap, correlation, prediction error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

# Cases that were timed against each other: methods of one point are interleaved in one process group.
POINT = ["hardware", "workload", "link", "link_ratio", "world_size", "kernel", "dtype", "batch", "seq_len", "heads"]
SPEEDUP = ["speedup", "speedup_low", "speedup_high", "predicted_speedup"]
RESAMPLES = 2_000
LEVEL = 0.95


class Interval(NamedTuple):
    """A value with its 95 % bootstrap interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int


def ratio_of_medians(base_ms: ArrayLike, ours_ms: ArrayLike) -> Interval:
    """median(base) / median(ours), resampled by rounds: `base_ms[i]` and `ours_ms[i]` were timed in the same round."""
    from scipy.stats import bootstrap

    base, ours = np.asarray(base_ms, dtype=float), np.asarray(ours_ms, dtype=float)
    n = min(len(base), len(ours))
    base, ours = base[:n], ours[:n]
    value = float(np.median(base) / np.median(ours))
    if n < 2:
        return Interval(value, float("nan"), float("nan"), n)

    def ratio(a: Any, b: Any, axis: int) -> Any:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    found = bootstrap(
        (base, ours), ratio, paired=True, method="percentile", n_resamples=RESAMPLES, confidence_level=LEVEL,
        rng=0,
    ).confidence_interval  # fmt: skip
    return Interval(value, float(found.low), float(found.high), n)


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's correlation; 0 where one of the two is flat, since a flat series has no order."""
    from scipy.stats import rankdata

    a, b = rankdata(x), rankdata(y)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def point_columns(records: pd.DataFrame) -> list[str]:
    """`POINT`, and the run where records of several are in one table: those were not timed against each other."""
    return [*POINT, "run"] if "run" in records else POINT


def speedups(records: pd.DataFrame, over: str | Sequence[str]) -> pd.DataFrame:
    """The correct measured cases with `speedup`, `speedup_low`, `speedup_high` over another method of the same point.

    `predicted_speedup` is prediction over prediction, missing where either has none.

    Args:
        records: as `hcms_lab.ground.load.records` gives them.
        over: a method; of several, the fastest at each point.

    Cases at points without that method are left out.
    """
    cases = measured(records)
    wanted = [over] if isinstance(over, str) else list(over)
    rows: list[dict[Any, Any]] = []
    for _, point in cases.groupby(point_columns(cases), dropna=False, sort=False):
        bases = point[point["method"].isin(wanted)].sort_values("latency_ms")
        if bases.empty:
            continue
        base = bases.iloc[0]
        for _, case in point.iterrows():
            found = ratio_of_medians(base["times_ms"], case["times_ms"])
            told = base["predicted_ms"] / case["predicted_ms"]
            made_of = (found.value, found.low, found.high, told)
            rows.append({**case.to_dict(), **dict(zip(SPEEDUP, made_of, strict=True))})
    made = pd.DataFrame(rows, columns=[*cases.columns, *SPEEDUP])
    made.attrs = dict(records.attrs)
    return made


def measured(records: pd.DataFrame) -> pd.DataFrame:
    """The cases that ran and gave a correct result, `times_ms` included."""
    good = (records["source"] == "measured") & records["ok"].fillna(False) & records["latency_ms"].notna()
    kept = records[good & records["times_ms"].notna()]
    kept.attrs = dict(records.attrs)
    return kept


def fastest(cases: pd.DataFrame, method: str = "hcms") -> pd.DataFrame:
    """Of a method's cases the one with the least latency at each point."""
    kept = cases[cases["method"] == method].sort_values("latency_ms", kind="stable")
    return kept.drop_duplicates(point_columns(kept)).sort_index()


def interpolated(x: Sequence[float], y: Sequence[float], at: float) -> float | None:
    """y at `at` on the broken line through the points; None outside of them."""
    order = np.argsort(x)
    xs, ys = np.asarray(x, dtype=float)[order], np.asarray(y, dtype=float)[order]
    if not len(xs) or not xs[0] <= at <= xs[-1]:
        return None
    return float(np.interp(at, xs, ys))


def prediction_error(records: pd.DataFrame) -> tuple[float, int] | None:
    """Median of |predicted / measured - 1| over the measured cases that have a prediction, and their number."""
    cases = measured(records)
    cases = cases[cases["predicted_ms"].notna()]
    if cases.empty:
        return None
    return float((cases["predicted_ms"] / cases["latency_ms"] - 1).abs().median()), len(cases)
