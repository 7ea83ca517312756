"""What figures share: the line that says where records come from, and how measured and predicted values are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from hcms.methods import METHODS
from hcms.schedule.cut import even
from hcms.transport import COLLECTIVE
from hcms_lab.ground.cuts import recorded_cut
from hcms_lab.ground.load import environment
from hcms_lab.report import style
from hcms_lab.report.stats import prediction_errors
from hcms_lab.report.words import listed, short_cut, short_hardware

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The nearer to several GPUs, the sooner it is drawn.
LINKS = ("native", "native-host", "ghost", "shared", "ghost-sm", "emulated")
PLACES = (*LINKS, "native-copy-engine")  # what `by_link` tells runs apart by: a link, a transport over one
ONE_OF_MANY = ("ghost", "ghost-sm")  # one process stands for all ranks
LOADS = ("sustained", "rested")  # what a user gets first


def hardware_name(records: pd.DataFrame) -> str:
    """The hardware's name from the run's env.json, or its slug where there is none."""
    folder = records.attrs.get("folder")
    hardware = environment(folder).get("hardware", {}) if folder else {}
    slug = str(records["hardware"].iloc[0])
    return str(hardware["name"]) if hardware.get("slug") == slug else slug


def of_one_kernel(records: pd.DataFrame) -> pd.DataFrame:
    """The records of one link, load and kernel, the first that was measured: a line through two would be of neither."""
    kept = of_one_link(records)
    kernels = kept["kernel"].dropna().unique()
    if len(kernels) > 1:
        attrs, kept = kept.attrs, kept[kept["kernel"] == kernels[0]]
        kept.attrs = dict(attrs)
    return kept


def of_one_link(records: pd.DataFrame) -> pd.DataFrame:
    """The records of one link under one load, since no line or column mixes two.

    Of several links that nearest to several GPUs, of several loads the sustained one.
    """
    kept = records
    for column, order in (("link", LINKS), ("load", LOADS)):
        present = set(kept[column].dropna()) if column in kept else set()
        if len(present) > 1:
            chosen = min(present, key=lambda name: (order.index(name) if name in order else len(order), name))
            kept = kept[kept[column] == chosen]
    kept.attrs = dict(records.attrs)
    return kept


def where(records: pd.DataFrame) -> str:
    """`Intel Xeon, 2 cores · emulated link · 2 ranks`: what every title says.

    Of a link that stands in for several GPUs it says what there was: `one rank of 4 on one H100, ghost link`.
    """
    name, links = hardware_name(records), sorted(set(records["link"].dropna()))
    ranks = listed(records["world_size"])
    either = " or ".join(ranks.rsplit(", ", 1))
    said = {
        "ghost": f"one rank of {either} on one {short_hardware(name)}, ghost link",
        "ghost-sm": f"one rank of {either} on one {short_hardware(name)}, ghost link driven by SMs",
        "shared": f"{ranks} ranks on one {short_hardware(name)}, shared link",
    }
    loads = sorted(set(records["load"].dropna())) if "load" in records else []
    if len(links) == 1 and links[0] in said:
        return ", ".join([said[links[0]], *(f"{load} load" for load in loads)])
    carried = sorted(set(records["transport"].dropna()) - {COLLECTIVE}) if "transport" in records else []
    return " · ".join([name, *(f"{link} link" for link in links), *carried, f"{ranks} ranks"])


def layer(records: pd.DataFrame, *, tokens: bool = True, kernel: bool = True) -> str:
    """`2,160 tokens · 20 heads of 128 · float32 · sdpa`, whatever is the same in all records."""
    parts = []
    lengths = records["seq_len"].dropna().unique()
    if tokens and len(lengths) == 1:
        parts.append(f"{int(lengths[0]):,} tokens")
    texts = (("heads", "{:.0f} heads of {}"), ("dtype", "{}"), ("kernel", "{}"))
    for column, text in texts if kernel else texts[:2]:
        values = records[column].dropna().unique()
        if len(values) == 1:
            parts.append(text.format(values[0], f"{records['head_dim'].iloc[0]:.0f}"))
    return " · ".join(parts)


def cut_shape(cut: str) -> str:
    """`equal`, `uneven` (as even as the heads permit) or `tapered`."""
    heads = recorded_cut(cut)
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
    """`median prediction error 3.1 % (ghost link, n = 24)`, by link, or nothing where no record has a prediction."""
    errors = prediction_errors(records)
    each = ", ".join(f"{100 * error:.1f} % ({link} link, n = {n})" for link, (error, n) in errors.items())
    return f"median prediction error {each}" if each else ""


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
        against: a row a point with HCMS's speedup over Ulysses, of which the first and the last by `x` are told.
        at: how a value of `x` reads, such as `"{:,.0f} tokens"`.
    """
    ends = [f"×{case['speedup']:.2f} at {at.format(case[x])}" for case in against.sort_values(x).to_dict("records")]
    result = f": HCMS {ends[0]}" + (f" to {ends[-1]}" if len(ends) > 1 else "") if ends else ""
    fig.set_label(f"{what}{result}.")


def methods_of(cases: pd.DataFrame) -> list[str]:
    """The methods of the table of methods that these records hold, in its order."""
    present = set(cases["method"])
    return [method for method in METHODS if method in present]


def cuts_of(best: pd.DataFrame, x: str) -> str:
    """`HCMS: cut 1-3-1 or 5`: which method and which cuts `stats.gains` picked, in the order of `x`."""
    cases = best.sort_values(x)
    methods, cuts = (
        list(dict.fromkeys(word for cell in cases[column].dropna() for word in str(cell).split(" or ")))
        for column in ("method", "cut")
    )
    return f"{' or '.join(map(style.label, methods))}: cut {' or '.join(map(short_cut, cuts))}" if methods else ""


def halo() -> list[Any]:
    """Path effects that keep text legible where a line runs behind it."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="white")]


def as_times(ax: Axes, *, digits: int = 2) -> None:
    """Write the y axis's speedups as `×1.25`."""
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:.{digits}f}"))
