"""Intervals for what records say: speedups by paired bootstrap, correlation, prediction error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from hcms.methods import METHODS

# Cases that were timed against each other: methods of one point are interleaved in one process group.
POINT = ["hardware", "workload", "link", "link_ratio", "world_size", "kernel", "dtype", "batch", "seq_len", "heads"]
SPEEDUP = ["speedup", "speedup_low", "speedup_high", "predicted_speedup"]
RESAMPLES = 2_000
LEVEL = 0.95
COMPOSED = "composed"  # the column of whole clips that says which never ran whole


class Interval(NamedTuple):
    """A value with its 95 % bootstrap interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int


def overlapping() -> list[str]:
    """The methods that are HCMS: they cut heads into chunks and communicate beside attention."""
    return [name for name, method in METHODS.items() if method.cuts and method.overlaps]


def ratio_of_medians(base_ms: ArrayLike, ours_ms: ArrayLike) -> Interval:
    """median(base) / median(ours), resampled by rounds: `base_ms[i]` and `ours_ms[i]` were timed in the same round."""
    n = min(np.size(base_ms), np.size(ours_ms))
    base, ours = (tuple(np.asarray(x, dtype=float)[:n].tolist()) for x in (base_ms, ours_ms))
    return _ratio_of_medians(base, ours)


@lru_cache(maxsize=4096)  # the same cases are asked for by figure, table and verdict
def _ratio_of_medians(base: tuple[float, ...], ours: tuple[float, ...]) -> Interval:
    n = len(base)
    value = float(np.median(base) / np.median(ours))
    if n < 2 or np.isnan(value):
        return Interval(value, float("nan"), float("nan"), n)
    rounds = _resampled_rounds(n, RESAMPLES)
    drawn = np.sort(_medians(np.array(base)[rounds]) / _medians(np.array(ours)[rounds]))
    low, high = (_percentile(drawn, share) for share in ((1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2))
    return Interval(value, low, high, n)


@lru_cache(maxsize=64)
def _resampled_rounds(n: int, resamples: int) -> np.ndarray:
    """`[resamples, n]`: which rounds each resample draws. The same for every pair of so many rounds."""
    return np.random.default_rng(0).integers(0, n, (resamples, n))


def _medians(times_ms: np.ndarray) -> np.ndarray:
    """Of every row; `np.median` takes many times as long over a few rounds."""
    ordered, half = np.sort(times_ms, axis=1), times_ms.shape[1] // 2
    return ordered[:, half] if times_ms.shape[1] % 2 else (ordered[:, half - 1] + ordered[:, half]) / 2


def _percentile(ordered: np.ndarray, share: float) -> float:
    """As `scipy.stats.bootstrap` reads it off, to the last digit: it takes eight times as long for the same numbers."""
    at = share * len(ordered) + (1 - share)  # counted from one
    below = int(at // 1) - 1
    above, weight = min(below + 1, len(ordered) - 1), at % 1
    return float((1 - weight) * ordered[below] + weight * ordered[above])


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's correlation; 0 where one of the two is flat, since a flat series has no order."""
    return float(rank_correlations(x, np.asarray(y, dtype=float)[None])[0])


def rank_correlations(x: ArrayLike, ys: np.ndarray) -> np.ndarray:
    """`rank_correlation` of x with every row of `ys`: thousands are redrawn, and one by one each takes long."""
    from scipy.stats import rankdata

    x = np.asarray(x, dtype=float)
    middle = (len(x) + 1) / 2  # of any ranks, ties or not
    of_x, of_ys = rankdata(x) - middle, rankdata(ys, axis=1) - middle
    scale = np.sqrt((of_x**2).sum() * (of_ys**2).sum(axis=1))
    return np.divide(of_ys @ of_x, scale, out=np.zeros(len(ys)), where=scale != 0)


def point_columns(records: pd.DataFrame) -> list[str]:
    """`POINT`, and the load and the run where records of several are in one table: those were timed apart."""
    return [*POINT, *(column for column in ("load", "run") if column in records)]


def fixed_cuts(records: pd.DataFrame) -> pd.DataFrame:
    """Without the cuts that were chosen automatically, which are cases of their own."""
    return _with_attrs(records[~records["cut"].fillna("").astype(str).str.startswith("auto")], records)


def speedups(records: pd.DataFrame, over: str | Sequence[str]) -> pd.DataFrame:
    """The correct measured cases with `speedup`, `speedup_low`, `speedup_high` over another method of the same point.

    `predicted_speedup` is prediction over prediction, missing where either has none.

    Args:
        records: as `hcms_lab.ground.load.records` gives them.
        over: a method; of several, the fastest at each point.

    Cases at points without that method are left out.
    """
    cases = measured(records)
    rows: list[dict[Any, Any]] = []
    for base, point in _points(cases, over):
        for case in point.to_dict("records"):
            interval = ratio_of_medians(base["times_ms"], case["times_ms"])
            predicted = base["predicted_ms"] / case["predicted_ms"]
            rows.append({**case, **dict(zip(SPEEDUP, (*interval[:3], predicted), strict=True))})
    return _with_attrs(pd.DataFrame(rows, columns=[*cases.columns, *SPEEDUP]), records)


def gains(records: pd.DataFrame, over: str | Sequence[str], methods: Iterable[str] | None = None) -> pd.DataFrame:
    """A row a point: the fastest fixed cut over `over`, as `speedups` has it, without the luck of having been picked.

    Each half of the rounds (the even, the odd) is scored with the case that was fastest in the other half. Where the
    halves disagree `cut` and `method` name both. A single round picks nothing: its point counts where there is one case
    to pick from.

    Args:
        methods: pick among these; `overlapping()` where not given.
    """
    cases = measured(fixed_cuts(records))
    wanted = overlapping() if methods is None else list(methods)
    rows: list[dict[Any, Any]] = []
    for base, point in _points(cases, over):
        ours = point[point["method"].isin(wanted)]
        rounds = min([len(base["times_ms"]), *(len(times) for times in ours["times_ms"])])
        if ours.empty or (len(ours) > 1 and rounds < 2):
            continue
        times_ms = np.array([times[:rounds] for times in ours["times_ms"]], dtype=float)
        half = np.arange(rounds) % 2
        picks = [pick(times_ms, half != h) for h in (0, 1)] if rounds > 1 else [0, 0]
        scored_ms = times_ms[np.array(picks)[half], np.arange(rounds)]
        chosen = ours.iloc[picks]
        case = chosen.iloc[0].to_dict()
        for column in ("method", "cut"):
            case[column] = " or ".join(dict.fromkeys(str(x) for x in chosen[column] if x is not None)) or None
        interval = ratio_of_medians(base["times_ms"], scored_ms)
        predicted = base["predicted_ms"] / case["predicted_ms"]
        case |= {"times_ms": scored_ms.tolist(), "latency_ms": float(np.median(scored_ms)), "n": rounds}
        rows.append({**case, **dict(zip(SPEEDUP, (*interval[:3], predicted), strict=True))})
    return _with_attrs(pd.DataFrame(rows, columns=[*cases.columns, *SPEEDUP]), records)


def pick(times_ms: np.ndarray, rounds: np.ndarray) -> int:
    """Which row of `[cases, rounds]` has the least median over these rounds."""
    return int(np.argmin(np.median(times_ms[:, rounds], axis=1)))


def _points(cases: pd.DataFrame, over: str | Sequence[str]) -> list[tuple[dict[Any, Any], pd.DataFrame]]:
    """Each point that has the baseline, with it; of several baselines the fastest."""
    wanted = [over] if isinstance(over, str) else list(over)
    points = []
    for _, point in cases.groupby(point_columns(cases), dropna=False, sort=False):
        bases = point[point["method"].isin(wanted)].sort_values("latency_ms")
        if len(bases):
            points.append((bases.iloc[0].to_dict(), point))
    return points


def measured(records: pd.DataFrame) -> pd.DataFrame:
    """The cases that ran and gave a correct result, `times_ms` included."""
    good = (records["source"] == "measured") & records["ok"].fillna(False) & records["latency_ms"].notna()
    return _with_attrs(records[good & records["times_ms"].notna()], records)


def composed(cases: pd.DataFrame) -> pd.DataFrame:
    """Cases of whole clips with a truth value a row: whether the clip was composed of timed steps, or ran whole."""
    known = cases[COMPOSED].fillna(False).astype(bool) if COMPOSED in cases else False
    return _with_attrs(cases.assign(**{COMPOSED: known}), cases)


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


def prediction_errors(records: pd.DataFrame) -> dict[str, tuple[float, int]]:
    """By link: the median of |predicted / measured - 1| over measured cases with a prediction, and their number."""
    cases = measured(records)
    cases = cases[cases["predicted_ms"].notna()]
    errors = (cases["predicted_ms"] / cases["latency_ms"] - 1).abs().groupby(cases["link"])
    return {str(link): (float(some.median()), len(some)) for link, some in errors}


def _with_attrs(table: pd.DataFrame, records: pd.DataFrame) -> pd.DataFrame:
    table.attrs = dict(records.attrs)
    return table
