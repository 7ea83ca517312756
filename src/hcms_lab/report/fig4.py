"""Figure 4: latency, speedup and time on the link by the number of ranks (C3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from hcms_lab.report import parts, style
from hcms_lab.report.registry import register
from hcms_lab.report.stats import fastest, fixed_cuts, gains, measured, overlapping

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@register("fig4", "Speedup and latency by rank count")
def fig4(records: pd.DataFrame) -> Figure:
    """Three panels over the rank counts; where ranks share a core, the background says so.

    Latency with quartiles, speedup over Ulysses with 95 % intervals (hollow: the simulator's), and the time that each
    method has communication under way, which for Ring grows with the ranks. Of several lengths the longest is drawn; of
    a method that cuts heads the fastest fixed cut, its speedup of rounds that did not pick it.
    """
    import matplotlib.pyplot as plt

    cases = parts.of_one_kernel(measured(fixed_cuts(records)))
    cases = cases[cases["seq_len"] == cases["seq_len"].max()]
    cases.attrs = dict(records.attrs)
    ranks = sorted(int(p) for p in cases["world_size"].unique())
    place = {p: float(i) for i, p in enumerate(ranks)}
    over_ulysses = gains(cases, "ulysses")
    communicating = ("ulysses", *overlapping(), "ring")
    with style.use():
        fig, axes = plt.subplots(1, 3, figsize=style.size("page", 0.46))
        latency, speedup, link = axes
        for method in (m for m in parts.methods_of(cases) if m != "hcms-serial"):
            look = parts.method_look(method)
            best = fastest(cases, method).sort_values("world_size")
            x = [place[int(p)] for p in best["world_size"]]
            parts.latency_line(latency, x, best, **look)
            if method in communicating:
                link.plot(x, best["comm_ms"], **look)
            if method == "ulysses":
                speedup.axhline(1, color=style.colour(method), linewidth=1)
                continue
            fast = gains(cases, "ulysses", [method]).sort_values("world_size")
            x = [place[int(p)] for p in fast["world_size"]]
            parts.speedup_line(speedup, x, fast, **look)
            predicted = fast[fast["predicted_speedup"].notna()]
            if method in communicating and len(predicted):
                at = [place[int(p)] + 0.07 for p in predicted["world_size"]]
                name = f"{style.label(method)}, simulator"
                hollow = {"color": look["color"], "marker": look["marker"], "label": name}
                speedup.plot(at, predicted["predicted_speedup"], **(hollow | style.PREDICTED_LINE))
        latency.set_ylabel("latency, ms")
        latency.set_ylim(bottom=0)
        speedup.set_ylabel("speedup over Ulysses")
        parts.as_times(speedup)
        link.set_ylabel("communicating, ms")
        link.set_ylim(bottom=0)
        ratios = cases.groupby("world_size")["comm_ratio"].first()
        for ax in axes:
            ax.set_xticks(list(place.values()), [f"{p}\nρ {ratios[p]:.2f}" for p in ranks])
            ax.set_xlim(-0.4, len(ranks) - 0.6)
            ax.set_xlabel("ranks, and ρ measured there")
            _shade_shared(ax, cases, place, written=ax is axes[0])
        parts.headline(
            fig,
            f"{parts.where(cases)} · {parts.layer(cases)}",
            f"n = {int(cases['n'].min())} · {parts.cuts_of(over_ulysses, 'world_size')}",
            parts.prediction_note(cases),
        )
        parts.legend_below(fig, list(axes), columns=4)
        parts.describe(
            fig, "Latency, speedup over Ulysses and communication time", over_ulysses, "world_size", "{:.0f} ranks"
        )
    return fig


def _shade_shared(ax: Axes, cases: pd.DataFrame, place: dict[int, float], *, written: bool) -> None:
    """A grey background behind the rank counts whose ranks share cores."""
    shared = [place[int(p)] for p, r in cases.groupby("world_size")["ranks_per_core"].max().items() if r > 1]  # type: ignore[arg-type]
    if not shared:
        return
    ax.axvspan(min(shared) - 0.5, max(shared) + 0.5, color="#F0F0F0", zorder=0)
    if written:
        ax.annotate(
            "ranks share cores", ((min(shared) + max(shared)) / 2, 0.02), xycoords=("data", "axes fraction"),
            ha="center", va="bottom", fontsize=6.5,
        )  # fmt: skip
