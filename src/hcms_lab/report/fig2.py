"""Figure 2: latency by the number of chunks: equal, uneven and tapered cuts, and what chunking alone costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from hcms.methods import METHODS
from hcms_lab.ground.cuts import chunks
from hcms_lab.report import parts, style
from hcms_lab.report.closed_form import two_lane_speedup
from hcms_lab.report.registry import register
from hcms_lab.report.stats import fastest, measured, point_columns, ratio_of_medians
from hcms_lab.report.words import short_cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS: dict[str, dict[str, Any]] = {
    "equal": {"marker": "D", "label": "HCMS, equal chunks"},
    "uneven": {"marker": "P", "label": "HCMS, uneven (chunks differ by one head)"},
    "tapered": {"marker": "^", "label": "HCMS, tapered (one head at the ends)"},
}
FEW = 4  # chunks of the tapered cut that is held against the best equal one
SIMULATED: dict[str, Any] = {
    "linestyle": "",
    "marker": "o",
    "markersize": 7,
    "color": "black",
    "markerfacecolor": "none",
    "markeredgewidth": 0.6,
    "label": "predicted by the simulator",
}


@register("fig2", "Latency by the number of chunks")
def fig2(records: pd.DataFrame) -> Figure:
    """A panel for each link ratio (or length); measured points with quartiles, closed form and simulator beside them.

    Args:
        records: with `ulysses`, `ulysses-packed`, `hcms-serial`, `hcms` and `ceiling` at each point.
    """
    import matplotlib.pyplot as plt

    cases = parts.of_one_kernel(measured(records))
    cases = cases.assign(
        chunks=[chunks(cut) for cut in cases["cut"]],
        shape=[parts.cut_shape(str(cut)) if cut else "" for cut in cases["cut"]],
    )
    points = [point for _, point in cases.groupby(point_columns(cases), dropna=False, sort=False)]
    points.sort(key=lambda point: (float(point["comm_ratio"].iloc[0]), point["seq_len"].iloc[0]))
    with style.use():
        fig, axes = plt.subplots(1, len(points), figsize=style.size("page", 0.55), squeeze=False)
        for ax, point in zip(axes[0], points, strict=True):
            _panel(ax, point)
        axes[0][0].set_ylabel("latency, ms")
        lengths = cases["seq_len"].nunique()
        parts.headline(
            fig,
            f"{parts.where(cases)} · {parts.layer(cases)}",
            f"n = {int(cases['n'].min())} · {parts.prediction_note(cases)}".removesuffix(" · "),
        )
        if lengths > 1:
            for ax, point in zip(axes[0], points, strict=True):
                ax.set_title(f"{int(point['seq_len'].iloc[0]):,} tokens, {ax.get_title(loc='left')}")
        parts.legend_below(fig, list(axes[0]), columns=3)
        best = fastest(cases).sort_values("comm_ratio").to_dict("records")
        each = "; ".join(f"{case['cut']} at ρ = {case['comm_ratio']:.2f}" for case in best)
        fig.set_label(f"Latency by the number of chunks, for equal, uneven and tapered cuts. Fastest: {each}.")
    return fig


def tapered_over_equal(point: pd.DataFrame) -> list[str]:
    """How the best tapered cut of few chunks compares with the best equal one, as a line; none where one is missing."""
    ours = point[point["method"] == "hcms"].sort_values("latency_ms")
    equal = ours[ours["shape"] == "equal"]
    tapered = ours[(ours["shape"] == "tapered") & (ours["chunks"] <= FEW)]
    if equal.empty or tapered.empty:
        return []
    lead = ratio_of_medians(equal["times_ms"].iloc[0], tapered["times_ms"].iloc[0])
    names = f"{tapered['cut'].iloc[0]} over {equal['chunks'].iloc[0]} equal chunks"
    return [f"{names}: ×{lead.value:.3f} [{lead.low:.3f}, {lead.high:.3f}]"]


def _panel(ax: Axes, point: pd.DataFrame) -> None:
    rho = float(point["comm_ratio"].iloc[0])
    ax.set_title("\n".join([f"measured ρ = {rho:.2f}", *tapered_over_equal(point)]))
    by_method = {str(name): group for name, group in point.groupby("method")}
    ours = by_method.get("hcms", point.iloc[:0])
    others = [
        name for name in by_method if name in METHODS and METHODS[name].cuts and name not in ("hcms", "hcms-serial")
    ]
    counts = sorted({int(k) for k in point.loc[point["method"].isin(["hcms", "hcms-serial", *others]), "chunks"]})
    place = {k: float(i) for i, k in enumerate(counts)}  # few counts far apart: each gets the same room
    for method in ("ulysses", "ulysses-packed", "ceiling"):
        if method in by_method:
            look = parts.method_look(method)
            dashes = look.get("linestyle", "-")
            ms = float(by_method[method]["latency_ms"].median())
            ax.axhline(ms, linewidth=1.1, color=look["color"], linestyle=dashes, label=look["label"])
    if "hcms-serial" in by_method:
        serial = by_method["hcms-serial"].sort_values("chunks")
        parts.latency_line(ax, [place[k] for k in serial["chunks"]], serial, **parts.method_look("hcms-serial"))
    if "ulysses" in by_method and 0 < rho < 1:
        base_ms = float(by_method["ulysses"]["latency_ms"].median())
        bound = [base_ms / two_lane_speedup(rho, k) for k in counts]
        look = {"color": style.colour("hcms"), "linewidth": 1.0, "linestyle": (0, (1, 1))}
        ax.plot([place[k] for k in counts], bound, label="closed form, equal chunks", **look)
    for shape, look in LOOKS.items():
        some = ours[ours["shape"] == shape].sort_values("chunks")
        if some.empty:
            continue
        tapered = shape == "tapered"
        x = [place[k] + (0.14 if tapered else -0.14) for k in some["chunks"]]
        colour = style.colour("hcms-3lane" if tapered else "hcms")
        parts.latency_line(ax, x, some, linestyle="", color=colour, markersize=5, **look)
        predicted = [(at, ms) for at, ms in zip(x, some["predicted_ms"], strict=True) if pd.notna(ms)]
        if predicted:
            ax.plot(*zip(*predicted, strict=True), **SIMULATED)
        for at, case in zip(x, some.to_dict("records"), strict=True):
            if shape != "equal":
                top_ms = case["latency_ms"] + parts.iqr(case["times_ms"])[2]
                ax.annotate(
                    short_cut(case["cut"]), (at, top_ms), xytext=(0, 5), textcoords="offset points", ha="center",
                    va="bottom", fontsize=6.5, rotation=90,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )  # fmt: skip
    middle_ms = (float(point["latency_ms"].min()) + float(point["latency_ms"].max())) / 2
    for method in others:  # ours: several cuts of as many chunks stand side by side
        some = by_method[method].sort_values(["chunks", "latency_ms"])
        x = [place[k] + 0.28 + 0.1 * i for k, i in zip(some["chunks"], some.groupby("chunks").cumcount(), strict=True)]
        parts.latency_line(
            ax, x, some, **{**parts.method_look(method), "linestyle": "", "marker": "s", "markersize": 4}
        )
        for at, case in zip(x, some.to_dict("records"), strict=True):
            low_ms, high_ms = (case["latency_ms"] + sign * parts.iqr(case["times_ms"])[2] for sign in (-1, 1))
            above = case["latency_ms"] < middle_ms  # towards the middle, where there is room
            ax.annotate(
                short_cut(case["cut"]), (at, high_ms if above else low_ms), xytext=(0, 5 if above else -5),
                textcoords="offset points", ha="center", va="bottom" if above else "top", fontsize=6.5, rotation=90,
            )  # fmt: skip
    ax.set_xlabel("chunks")
    ax.set_xticks(list(place.values()), [str(k) for k in counts])
    ax.set_xlim(-0.5, len(counts) - 0.5)
    ax.margins(y=0.1)
