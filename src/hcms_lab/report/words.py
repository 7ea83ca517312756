"""How numbers and hardware read in titles, tables and verdicts."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hcms_lab.report.stats import Interval


def percent(share: float, digits: int = 1) -> str:
    """`+12.3 %`."""
    return f"{100 * share:+.{digits}f} %".replace("-", "−")


def gain(speedup: Interval) -> str:
    """A speedup's gain with its interval where it has one: `+12.3 % [+10.0 %, +14.1 %]`."""
    if speedup.low != speedup.low:
        return percent(speedup.value - 1)
    return f"{percent(speedup.value - 1)} [{percent(speedup.low - 1)}, {percent(speedup.high - 1)}]"


def span(low: float, high: float, digits: int = 1) -> str:
    """Two shares as a range: `+1.0 % to +2.0 %`, or one where they read alike."""
    ends = dict.fromkeys((percent(low, digits), percent(high, digits)))
    return " to ".join(ends)


def short_hardware(name: str) -> str:
    """`H100` of `NVIDIA H100 80GB HBM3`, `AMD EPYC` of `AMD EPYC, 2 cores`."""
    return re.sub(r"( Processor)?,.*$| \d+ ?GB.*$", "", name.removeprefix("NVIDIA "))


def short_cut(cut: str) -> str:
    """A cut with runs of six or more equal chunks counted: `10×1` of ten chunks of a head, `1-8×3-1`."""
    before, colon, chunks = cut.rpartition(":")
    parts = []
    for heads, run in groupby(chunks.split("-")):
        count = len(list(run))
        parts += [f"{count}×{heads}"] if count > 5 else [heads] * count
    return before + colon + "-".join(parts)


def listed(numbers: object) -> str:
    """Whole numbers, each once, ascending: `2, 4, 8`."""
    return ", ".join(str(n) for n in sorted({int(n) for n in numbers}))  # pyright: ignore[reportGeneralTypeIssues]
