"""Figure 5: speedup by the communication ratio, against the closed form and the simulator (C6, C7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hcms_lab.ground.cuts import chunks
from hcms_lab.report import parts, style
from hcms_lab.report.closed_form import speedup_limit, two_lane_speedup
from hcms_lab.report.judge_ratio import correlation_in_words, correlation_of_gains, gain_at, ratio_gains
from hcms_lab.report.registry import register
from hcms_lab.report.stats import fastest, fixed_cuts, gains, measured, overlapping, speedups
from hcms_lab.report.words import percent, short_cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = (0.10, 0.20)
STRONGER_AT = (0.25, 0.40)
CUT_MARKERS = ("D", "^", "p", "h", "v")
AUTO = "chosen automatically"


@register("fig5", "Speedup by communication ratio")
def fig5(records: pd.DataFrame) -> Figure:
    """Measured speedups with 95 % intervals over Ulysses, and over the stronger baseline that packs Q, K and V.

    Lines are the closed form for the most equal chunks and the limit of any overlap; hollow marks are the simulator's.
    The title holds the verdicts.
    """
    import matplotlib.pyplot as plt

    records = parts.of_one_kernel(records)
    cases = measured(records)
    with style.use():
        fig, axes = plt.subplots(1, 2, figsize=style.size("page", 0.62), sharey=True, sharex=True)
        for ax, base in zip(axes, ("ulysses", "ulysses-packed"), strict=True):
            against = speedups(cases, base)
            _panel(ax, against[against["comm_ratio"].notna()], base)
        axes[0].set_xlim(left=0)
        headline = [f"{parts.where(cases)} · {parts.layer(cases)}", *verdicts(records)]
        parts.headline(fig, *headline)
        parts.legend_below(fig, list(axes), columns=3)
        parts.describe(fig, "Speedup over Ulysses", ratio_gains(records), "ratio", "ρ = {:.2f}")
    return fig


def verdicts(records: pd.DataFrame) -> list[str]:
    """What the run says in numbers, a line each.

    C6 and C7 over Ulysses; the gain over the stronger baseline at 25 and 40 %; how near the automatic cut comes, at
    its worst point, to the faster Ulysses and to the fastest fixed cut.
    """
    points = ratio_gains(records)
    words = []
    if len(points) >= 3:
        words.append(correlation_in_words(correlation_of_gains(points)))
    words.append(_read_off("over Ulysses", points, MARKS))
    words.append(_read_off("over packed", gains(records, "ulysses-packed"), STRONGER_AT, "comm_ratio"))
    more = [f"n = {int(measured(records)['n'].min())}"]
    over_serial = speedups(records, ("ulysses", "ulysses-packed"))
    chosen = over_serial[over_serial["cut"].fillna("").astype(str).str.startswith("auto")]
    if len(chosen):
        best = fastest(fixed_cuts(over_serial)).set_index("comm_ratio")["latency_ms"]
        near = [best.get(case["comm_ratio"], np.nan) / case["latency_ms"] for case in chosen.to_dict("records")]
        text = f"automatic cut at worst ×{chosen['speedup'].min():.2f} of the faster Ulysses"
        more.append(text + (f", ×{np.nanmin(near):.2f} of the best fixed" if np.isfinite(near).any() else ""))
    lines = (words, more, [parts.prediction_note(records)])
    return [" · ".join(word for word in line if word) for line in lines]


def _read_off(what: str, points: pd.DataFrame, ratios: tuple[float, ...], column: str = "ratio") -> str:
    read = [(ratio, gain_at(points, ratio, column)) for ratio in ratios]
    words = [f"{percent(gain.value - 1)} at {ratio:.2f}" for ratio, gain in read if gain is not None]
    return f"{what} {', '.join(words)}" if words else ""


def _panel(ax: Axes, cases: pd.DataFrame, base: str) -> None:
    ax.set_title(f"over {style.label(base)}")
    ax.axhline(1, color=style.colour(base), linewidth=1)
    for ratio in MARKS:
        ax.axvline(ratio, color="#888888", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.annotate(
            f"{ratio:.0%}".replace("%", " %"), (ratio, 1), xycoords=("data", "axes fraction"), xytext=(2, -1),
            textcoords="offset points", fontsize=6.5, va="top", color="#555555",
        )  # fmt: skip
    top = float(cases["comm_ratio"].max())
    ratios = np.linspace(0, min(0.95, top * 1.03), 200)
    ours = cases[cases["method"].isin(overlapping())]
    several = ours["method"].nunique() > 1
    ours = ours.assign(
        name=[
            (f"{style.label(method)}, " if several else "HCMS, ")
            + (AUTO if str(cut).startswith("auto") else f"cut {short_cut(str(cut))}")
            for method, cut in zip(ours["method"], ours["cut"], strict=True)
        ],
        chunks=[chunks(cut) for cut in ours["cut"]],
    )
    equal = [case["chunks"] for case in ours.to_dict("records") if parts.cut_shape(case["cut"]) == "equal"]
    if equal:
        most = max(equal)
        bound = [two_lane_speedup(float(r), most) for r in ratios]
        look = {"color": style.colour("hcms"), "linewidth": 1, "linestyle": (0, (1, 1))}
        ax.plot(ratios, bound, label=f"closed form, {most} equal chunks", **look)
    limit = {"color": "black", "linewidth": 0.8, "linestyle": (0, (4, 2))}
    ax.plot(ratios, [speedup_limit(float(r)) for r in ratios], label="limit of any overlap", **limit)
    names = sorted(set(ours["name"]), key=lambda name: (name.endswith(AUTO), name))
    width = 0.003 * top / 0.6
    for i, name in enumerate(names):
        some = ours[ours["name"] == name].sort_values("comm_ratio")
        x = some["comm_ratio"] + width * (2 * i - len(names) + 1)
        is_auto = name.endswith(AUTO)
        colour = style.colour("hcms-3lane" if is_auto and not several else str(some["method"].iloc[0]))
        look = {"color": colour, "marker": CUT_MARKERS[i % len(CUT_MARKERS)], "markersize": 4, "linestyle": ""}
        parts.speedup_line(ax, x.tolist(), some, label=name, **look)
        predicted = some["predicted_speedup"].notna()
        if predicted.any() and not is_auto:
            hollow = {"color": "black", "marker": look["marker"], "markersize": 7, "markerfacecolor": "none"}
            x, y = x[predicted], some.loc[predicted, "predicted_speedup"]
            ax.plot(
                x, y, linestyle="", markeredgewidth=0.6, label=f"simulator, {name.removeprefix('HCMS, ')}", **hollow
            )
    ring = cases[cases["method"] == "ring"].sort_values("comm_ratio")
    if len(ring):
        parts.speedup_line(ax, ring["comm_ratio"].tolist(), ring, **(parts.method_look("ring") | {"linewidth": 0.8}))
    ax.set_xlabel("communication ratio ρ, measured in Ulysses")
    if base == "ulysses":
        ax.set_ylabel("speedup")
    parts.as_times(ax)
