"""Figure 6: hardware types: measured where there are records, predicted for the GPUs of the catalogue (C3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from hcms.schedule import catalogue
from hcms_lab.report import parts, style
from hcms_lab.report.claims import band
from hcms_lab.report.registry import register
from hcms_lab.report.stats import gains
from hcms_lab.report.words import listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINES = ("ulysses", "ulysses-packed")
FREED: dict[str, Any] = {"marker": "D", "markersize": 3, "linestyle": "none", "color": "black", "fillstyle": "none"}


@register("fig6", "Hardware types")
def fig6(records: pd.DataFrame) -> Figure:
    """Gains of HCMS over the faster Ulysses; measured above, solid; predicted below, hatched.

    Measured rows are a hardware, link and rank count each, with the shortest and the longest sequence; predicted rows a
    GPU and link, in the order of their gain. Error bars: 95 % intervals above, the catalogue's ranges below. Diamonds:
    what is predicted where attention's kernel holds every SM, if exchanges needed none.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    above, below = measured_rows(records), predicted_rows(records)
    blocks = [rows for rows in (above, below) if rows]
    with style.use():
        heights = [len(rows) + 1.2 for rows in blocks]
        fig, axes = plt.subplots(
            len(blocks), 1, figsize=(style.PAGE_IN, 0.9 + 0.21 * sum(heights)), height_ratios=heights, squeeze=False,
            sharex=True,
        )  # fmt: skip
        for ax, rows, is_measured in zip(axes[:, 0], blocks, (True, False) if above else (False,), strict=False):
            low, high = band("C1")
            ax.axvspan(100 * low, 100 * high, **style.PAPER_BAND)
            ax.axvline(0, color="black", linewidth=0.8)
            _rows(ax, rows, {} if is_measured else style.PREDICTED)
        axes[0, 0].set_title("measured" if above else "predicted from data sheets and published rates")
        if above and below:
            axes[1, 0].set_title("predicted from data sheets and published rates")
        axes[-1, 0].set_xlabel("gain of HCMS over the faster Ulysses, %")
        predicted = records[records["source"] == "predicted"]
        ranks = listed(predicted["world_size"])
        lengths = sorted({int(s) for s in predicted["seq_len"]})
        parts.headline(
            fig,
            f"hardware types · predictions: {ranks} GPUs, {parts.layer(predicted, kernel=False)}, "
            + " and ".join(f"{s:,} tokens" for s in lengths),
        )
        colours = _colours()
        handles: list[Any] = [
            Patch(color=colours[0], label="shortest sequence"),
            Patch(color=colours[1], label="longest sequence"),
        ]
        handles.append(Patch(facecolor="#999999", label="predicted", **style.PREDICTED))
        if any(gain is not None for row in below for gain in row["freed"]):
            handles.append(Line2D([], [], label="if exchanges needed no SM", **FREED))
        handles.append(Patch(label="paper, C1: 10 to 17.5 %", **style.PAPER_BAND))
        fig.legend(handles=handles, loc="outside lower center", ncols=4)
        best = max(below, key=lambda row: row["gains"][0][0], default=None)
        fig.set_label(
            f"Gain of HCMS by hardware: {len(above)} measured rows, {len(below)} predicted"
            + (f", the highest for {best['label']} at {100 * best['gains'][0][0]:.0f} %." if best else ".")
        )
    return fig


def _colours() -> tuple[str, str]:
    return style.colour("hcms"), style.colour("hcms-3lane")


def measured_rows(records: pd.DataFrame) -> list[dict[str, Any]]:
    """A row a hardware, link and rank count: gain with its interval at the shortest and the longest sequence.

    Of the kernel that was measured first there.
    """
    best = gains(records, BASELINES)
    best = best[best["kernel"] == best.groupby(["hardware", "link"])["kernel"].transform("first")]
    rows = []
    for (hardware, link, _, _), cases in best.groupby(["hardware", "link", "world_size", "heads"]):
        ordered = cases.sort_values("seq_len")
        ends = [ordered.iloc[0], ordered.iloc[-1]] if len(ordered) > 1 else [ordered.iloc[0]]
        shares = [tuple(float(case[c]) - 1 for c in ("speedup", "speedup_low", "speedup_high")) for case in ends]
        rho = " / ".join(f"{100 * float(case['comm_ratio']):.0f}" for case in ends)
        shared = ", cores shared" if (cases["ranks_per_core"].fillna(1) > 1).any() else ""
        tokens = " / ".join(f"{int(case['seq_len']):,}" for case in ends)
        ranks = int(ends[0]["world_size"])
        note = f"ρ {rho} %, {tokens} tokens, {int(ends[0]['heads']) // ranks} heads{shared}"
        held = f"one rank of {ranks}" if link in parts.ONE_OF_MANY else f"{ranks} ranks"
        rows.append({"label": f"{hardware}, {held}, {link}", "gains": shares, "note": note})
    return rows


def predicted_rows(records: pd.DataFrame) -> list[dict[str, Any]]:
    """A row a GPU and link, the highest gain first."""
    predicted = records[(records["source"] == "predicted") & (records["method"] == "hcms")]
    known = catalogue.load().gpus
    rows = []
    for (slug, link, _), cases in predicted.groupby(["hardware", "link", "world_size"], sort=False):
        ordered = cases.sort_values("seq_len")
        ends = [ordered.iloc[0], ordered.iloc[-1]] if len(ordered) > 1 else [ordered.iloc[0]]
        columns = ("predicted_gain", "predicted_gain_low", "predicted_gain_high")
        shares = [tuple(float(case[c]) for c in columns) for case in ends]
        rho = " / ".join(f"{100 * float(case['comm_ratio']):.0f}" for case in ends)
        name = known[str(slug)].name if str(slug) in known else str(slug)
        several = f", {int(ends[0]['world_size'])} GPUs" if predicted["world_size"].nunique() > 1 else ""
        label = f"{name}, {link}{several}"
        freed = [None if pd.isna(gain := case.get("predicted_gain_freed")) else float(gain) for case in ends]
        rows.append({"label": label, "gains": shares, "freed": freed, "note": f"ρ {rho} %, {ends[0]['kernel']}"})
    return sorted(rows, key=lambda row: -row["gains"][0][0])


def _rows(ax: Axes, rows: list[dict[str, Any]], look: dict[str, Any]) -> None:
    for y, row in enumerate(rows):
        bars = row["gains"]
        height = 0.8 / len(bars)
        for i, ((gain, low, high), colour) in enumerate(zip(bars, _colours(), strict=False)):
            at = y + (i - (len(bars) - 1) / 2) * height
            ax.barh(at, 100 * gain, height=height, color=colour, **look)
            if freed := row.get("freed", [None] * len(bars))[i]:
                ax.plot(100 * freed, at, **FREED)
            error = ([max(0.0, 100 * (gain - low))], [max(0.0, 100 * (high - gain))])
            ax.errorbar(100 * gain, at, xerr=error, fmt="none", ecolor="black", elinewidth=0.7, capsize=1.2)
        ax.annotate(
            row["note"], (1.01, y), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=6,
            annotation_clip=False,
        )  # fmt: skip
    ax.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=6.5)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
