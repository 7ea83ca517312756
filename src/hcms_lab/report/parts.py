"""What figures share: the line that says where records come from, and how measured and predicted values are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from hcms.methods import METHODS
from hcms.schedule.cut import even
from hcms_lab.ground.load import environment
from hcms_lab.report import style
from hcms_lab.report.stats import fastest, prediction_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def hardware_name(records: pd.DataFrame) -> str:
    """The hardware's name from the run's env.json, or its slug where there is none."""
    folder = records.attrs.get("folder")
    found = environment(folder).get("hardware", {}) if folder else {}
    slug = str(records["hardware"].iloc[0])
    return str(found["name"]) if found.get("slug") == slug else slug


def where(records: pd.DataFrame, *, ranks: bool = True) -> str:
    """`Intel Xeon, 2 cores · emulated link · 2 ranks`: what every title says."""
    links = sorted(set(records["link"].dropna()))
    parts = [hardware_name(records), *(f"{link} link" for link in links)]
    if ranks:
        counts = sorted({int(p) for p in records["world_size"]})
        parts.append(f"{', '.join(map(str, counts))} ranks")
    return " · ".join(parts)


def layer(records: pd.DataFrame, *, tokens: bool = True, kernel: bool = True) -> str:
    """`2,160 tokens · 20 heads of 128 · float32 · sdpa`, whatever is the same in all records."""
    parts = []
    lengths = records["seq_len"].dropna().unique()
    if tokens and len(lengths) == 1:
        parts.append(f"{int(lengths[0]):,} tokens")
    told = (("heads", "{:.0f} heads of {}"), ("dtype", "{}"), ("kernel", "{}"))
    for column, text in told if kernel else told[:2]:
        values = records[column].dropna().unique()
        if len(values) == 1:
            parts.append(text.format(values[0], f"{records['head_dim'].iloc[0]:.0f}"))
    return " · ".join(parts)


def cut_shape(cut: str) -> str:
    """`equal`, `uneven` (as even as the heads permit) or `tapered`."""
    heads = tuple(map(int, cut.removeprefix("auto:").split("-")))
    if len(set(heads)) == 1:
        return "equal"
    return "uneven" if sorted(heads) == sorted(even(sum(heads), len(heads))) else "tapered"


def headline(fig: Figure, *lines: str) -> None:
    """The figure's title: its first line says what, where and on how many ranks."""
    fig.suptitle("\n".join(line for line in lines if line), x=0.01, ha="left", fontsize=8)


def iqr(times_ms: Sequence[float]) -> tuple[float, float, float]:
    """Median, and how far below and above it the quartiles lie."""
    q25, q50, q75 = (float(x) for x in pd.Series(list(times_ms)).quantile([0.25, 0.5, 0.75]))
    return q50, q50 - q25, q75 - q50


def latency_line(ax: Axes, x: Sequence[Any], cases: pd.DataFrame, **kwargs: Any) -> None:
    """Medians of measured times with their quartiles as error bars; `cases` in the order of `x`."""
    spread = [iqr(times) for times in cases["times_ms"]]
    below, above = [s[1] for s in spread], [s[2] for s in spread]
    ax.errorbar(x, [s[0] for s in spread], yerr=(below, above), **kwargs)


def speedup_line(ax: Axes, x: Sequence[Any], cases: pd.DataFrame, **kwargs: Any) -> None:
    """Measured speedups with their 95 % intervals; `cases` as `stats.speedups` makes them, in the order of `x`."""
    values = cases["speedup"].to_numpy(dtype=float)
    below = (values - cases["speedup_low"].to_numpy(dtype=float)).clip(min=0)
    above = (cases["speedup_high"].to_numpy(dtype=float) - values).clip(min=0)
    ax.errorbar(x, values, yerr=(below, above), **kwargs)


def method_look(method: str) -> dict[str, Any]:
    """The fixed colour, marker and dash of a method, for `plot` and `errorbar`."""
    look: dict[str, Any] = {
        "color": style.colour(method),
        "marker": style.marker(method),
        "label": style.label(method),
    }
    if method in METHODS and METHODS[method].dashed:
        look["linestyle"] = (0, (4, 2))
    return look


def prediction_note(records: pd.DataFrame) -> str:
    """`median prediction error 3.1 % (n = 24)`, or nothing where no record has a prediction."""
    found = prediction_error(records)
    return "" if found is None else f"median prediction error {found[0]:.1%} (n = {found[1]})".replace("%", " %")


def legend_below(fig: Figure, axes: Sequence[Axes], *, columns: int) -> None:
    """One legend for all panels under the figure, each entry once."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    fig.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns)


def describe(fig: Figure, what: str, against: pd.DataFrame, x: str, at: str) -> None:
    """Give the figure the sentence that stands for it where it cannot be seen (`fig.get_label()`).

    Args:
        against: cases with speedups over Ulysses, of which the HCMS's first and last by `x` are told.
        at: how a value of `x` reads, such as `"{:,.0f} tokens"`.
    """
    best = fastest(against).sort_values(x)
    ends = [f"×{case['speedup']:.2f} at {at.format(case[x])}" for case in best.to_dict("records")]
    told = f": HCMS {ends[0]}" + (f" to {ends[-1]}" if len(ends) > 1 else "") if ends else ""
    fig.set_label(f"{what}{told}.")


def halo() -> list[Any]:
    """Path effects that keep text legible where a line runs behind it."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="white")]


def as_times(ax: Axes, *, digits: int = 2) -> None:
    """Write the y axis's speedups as `×1.25`."""
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:.{digits}f}"))
