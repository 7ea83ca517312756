"""Figure 3: latency by sequence length, and the speedups under it with what the paper reports (C1, C2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from hcms_lab.report import parts, style
from hcms_lab.report.claims import band
from hcms_lab.report.registry import register
from hcms_lab.report.stats import fastest, fixed_cuts, gains, measured, overlapping

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (("ulysses", "C1"), ("ring", "C2"))


@register("fig3", "Latency by sequence length")
def fig3(records: pd.DataFrame) -> Figure:
    """Latency of each method with quartiles above; speedup over Ulysses and over Ring, where they ran, below, with 95 %
    intervals.

    Of a method that cuts heads the fastest fixed cut at each length is drawn; its speedup is that of rounds that did
    not pick it.
    """
    import matplotlib.pyplot as plt

    cases = parts.of_one_kernel(measured(fixed_cuts(records)))
    lengths = sorted(int(s) for s in cases["seq_len"].unique())
    panels = [(base, claim) for base, claim in PANELS if (cases["method"] == base).any()]
    below = [base for base, _ in panels]
    rows: list[Any] = [["latency"] * len(below), below] if below else [["latency"]]
    with style.use():
        fig, axes = plt.subplot_mosaic(
            rows,
            figsize=style.size("page", 0.78),
            height_ratios=[1.15, 1] if below else None,
        )
        top = axes["latency"]
        for method in parts.methods_of(cases):
            best = fastest(cases, method).sort_values("seq_len")
            parts.latency_line(top, best["seq_len"].tolist(), best, **parts.method_look(method))
        top.set_ylabel("latency, ms")
        top.set_ylim(bottom=0)
        top.legend(loc="upper left", ncols=2)  # serves all panels: a method looks the same in each
        for base, claim in panels:
            _speedups(axes[base], cases, base, claim)
        for ax in axes.values():
            ax.set_xticks(lengths, [f"{s:,}" for s in lengths])
            ax.set_xlabel("tokens")
        ratios = [float(x) for x in cases.drop_duplicates("seq_len")["comm_ratio"].dropna()]
        ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios, default=0.0), max(ratios, default=0.0)))
        rho = f"measured ρ {' to '.join(ends)}"
        over_ulysses = gains(cases, "ulysses")
        parts.headline(
            fig,
            f"{parts.where(cases)} · {parts.layer(cases, tokens=False)}",
            f"{rho} · n = {int(cases['n'].min())} · {parts.cuts_of(over_ulysses, 'seq_len')}",
            parts.prediction_note(cases),
        )
        parts.describe(
            fig, "Latency by sequence length; speedup over Ulysses", over_ulysses, "seq_len", "{:,.0f} tokens"
        )
    return fig


def _speedups(ax: Axes, cases: pd.DataFrame, base: str, claim: str) -> None:
    low, high = band(claim)
    ax.axhspan(1 + low, 1 + high, **style.PAPER_BAND)
    ax.annotate(
        f"paper, {claim}: 4 GPUs", (0, 1 + (low + high) / 2), xycoords=("axes fraction", "data"), xytext=(3, 0),
        textcoords="offset points", va="center", fontsize=6.5, path_effects=parts.halo(),
    )  # fmt: skip
    ax.axhline(1, color=style.colour(base), linewidth=1)
    drawn = ("ulysses", *overlapping(), "ring", "ceiling")
    for method in (m for m in parts.methods_of(cases) if m in drawn and m != base):
        best = gains(cases, base, [method]).sort_values("seq_len")
        if len(best):
            parts.speedup_line(ax, best["seq_len"].tolist(), best, **parts.method_look(method))
    ax.set_ylabel(f"speedup over {style.label(base)}")
    parts.as_times(ax)
    ax.margins(x=0.12, y=0.12)
