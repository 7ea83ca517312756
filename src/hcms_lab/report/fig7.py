"""Figure 7: the whole Wan2.2 pipeline: where a clip's time goes, and what faster attention makes of it (C4, C5)."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hcms_lab.report import parts, style
from hcms_lab.report.claims import claims
from hcms_lab.report.registry import register
from hcms_lab.report.stats import COMPOSED, composed, measured
from hcms_lab.report.words import short_cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE = 110  # characters that fit into the title's width
POINT = ["workload", "world_size", "link", "link_ratio", "num_frames", COMPOSED]

# From the attention outwards: name, the records' columns, colour.
STACK: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("self-attention with its exchange", ("self_attention_ms",), "#0072B2"),
    ("projections around it", ("self_projections_ms",), "#56B4E9"),
    ("cross-attention", ("cross_attention_ms",), "#009E73"),
    ("feed-forward", ("feed_forward_ms",), "#E69F00"),
    ("rest of the denoising", ("transformer_rest_ms", "scheduler_ms"), "#CC79A7"),
    ("VAE", ("vae_encode_ms", "vae_decode_ms"), "#7F7F7F"),
    ("text encoder and other", ("text_encoder_ms", "other_ms"), "#BBBBBB"),
)


@register("fig7", "The whole Wan2.2 pipeline", stills="media/still-*.png")
def fig7(records: pd.DataFrame) -> Figure:
    """A row a clip length: stacked parts of each method; gains of attention and clip; the clip's against Amdahl's law.

    Args:
        records: `ClipRecord`s of clips, `ulysses` among each length's methods. Of several cuts of a method the fastest
            is drawn. Clips that were composed of timed steps have rows of their own, and are called so.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    cases = composed(parts.of_one_link(measured(records)))
    points = [
        (key, rows) for key, rows in cases.groupby(POINT, dropna=False, sort=False) if "ulysses" in set(rows["method"])
    ]
    with style.use():
        fig, axes = plt.subplots(
            len(points), 3, figsize=(style.PAGE_IN, 0.9 + 1.95 * len(points)), width_ratios=(1.35, 1, 1), squeeze=False
        )
        sentences = []
        for row, (_, rows) in zip(axes, points, strict=True):
            best = rows.sort_values("latency_ms").drop_duplicates("method").set_index("method")
            best = best.loc[style.in_order(best.index)]
            _stack(row[0], best)
            _gains(row[1], best)
            _amdahl(row[2], best)
            first = best.iloc[0]
            rho = "" if pd.isna(first["comm_ratio"]) else f", ρ = {float(first['comm_ratio']):.2f}"
            kind = ", composed" if first[COMPOSED] and not cases[COMPOSED].all() else ""
            row[0].set_title(f"{int(first['num_frames'])} frames, {int(first['seq_len']):,} tokens{rho}{kind}")
            sentences.append(_in_words(best))
        for ax, title in ((axes[0][1], "gain over Ulysses"), (axes[0][2], "against Amdahl's law")):
            ax.set_title(title)
        one = cases.iloc[0]
        weights = " and ".join(f"{w} weights" for w in dict.fromkeys(cases["weights"]))
        steps = f"{int(one['steps'])} steps" + ("" if float(one["guidance"]) <= 1 else " with guidance")
        parts.headline(
            fig,
            f"{one['workload']}, {weights} · {parts.where(cases)}",
            f"{steps}, flow shift {float(one['flow_shift']):g} · {_counted(cases)}",
            *wrap("; ".join(f"{style.label(m)}: {', '.join(cuts)}" for m, cuts in _cuts(cases).items()), LINE),
        )
        handles: list[Any] = [Patch(color=colour, label=name) for name, _, colour in STACK]
        fig.legend(handles=handles, loc="outside lower center", ncols=4)
        fig.set_label(" ".join(sentences))
    return fig


def _counted(cases: pd.DataFrame) -> str:
    """How many clips a method there are, or of what they are composed where none ran whole."""
    made = cases[~cases[COMPOSED]]
    said = [f"n = {int(made['n'].min())} clips a method"] if len(made) else []
    if len(put := cases[cases[COMPOSED]]):
        timed, layers = int(put["layers_timed"].min()), int(put["layers"].iloc[0])
        of = "" if timed == layers else f" with {timed} of {layers} layers"
        said.append(f"clips composed of n = {int(put['n'].min())} timed steps a method{of}, text encoder and VAE")
    return ", ".join(said)


def _cuts(cases: pd.DataFrame) -> dict[str, list[str]]:
    """The cuts that are drawn of each method, each once."""
    best = cases[cases["cut"].notna()].sort_values("latency_ms").drop_duplicates([*POINT, "method"])
    return {
        str(m): list(dict.fromkeys(short_cut(str(cut)) for cut in its["cut"]))
        for m, its in best.groupby("method", sort=False)
    }


def _in_words(best: pd.DataFrame) -> str:
    hcms: Any = best.loc["hcms"] if "hcms" in best.index else best.iloc[-1]
    share = 100 * float(best.iloc[0]["self_attention_share"])
    attention, clip = (100 * (float(hcms[c]) - 1) for c in ("attention_speedup_vs_ulysses", "speedup_vs_ulysses"))
    kind = "a clip, composed of timed steps," if hcms[COMPOSED] else "a clip"
    return (
        f"At {int(hcms['num_frames'])} frames, attention takes {share:.0f} % of {kind} under Ulysses; HCMS makes it "
        f"{attention:.1f} % faster and the clip {clip:.1f} %."
    )


def _stack(ax: Axes, best: pd.DataFrame) -> None:
    """One bar a method, its parts from the left, in seconds."""
    rows = np.arange(len(best))
    left = np.zeros(len(best))
    for _, columns, colour in STACK:
        seconds = best[list(columns)].astype(float).fillna(0.0).sum(axis=1).to_numpy() / 1e3
        ax.barh(rows, seconds, left=left, color=colour, height=0.72, edgecolor="white", linewidth=0.4)
        left += seconds
    for row, total in zip(rows, left, strict=True):
        ax.annotate(f"{total:.{max(0, 2 - int(np.log10(max(total, 1.0))))}f}", (total, row), xytext=(2, 0),
                    textcoords="offset points", va="center", fontsize=6.5)  # fmt: skip
    ax.set_yticks(rows, [style.label(str(m)) for m in best.index])
    ax.invert_yaxis()
    ax.margins(x=0.14)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(f"parts of the median {'composed ' if best[COMPOSED].iloc[0] else ''}clip, s")


def _gains(ax: Axes, best: pd.DataFrame) -> None:
    """Attention's gain beside the clip's, with 95 % intervals and the paper's marks."""
    others = best.drop(index="ulysses")
    rows = np.arange(len(others))
    kinds = (
        ("attention_speedup_vs_ulysses", "attention_speedup_interval", "C5", -0.2, 1.0),
        ("speedup_vs_ulysses", "speedup_interval", "C4", 0.2, 0.45),
    )
    for column, interval, claim, offset, alpha in kinds:
        for row, (method, case) in zip(rows, others.iterrows(), strict=True):
            gain = 100 * (float(case[column]) - 1)
            low, high = (100 * (float(x) - 1) for x in case[interval])
            error = ([max(0.0, gain - low)], [max(0.0, high - gain)])
            ax.bar(row + offset, gain, width=0.36, color=style.colour(str(method)), alpha=alpha)
            ax.errorbar(row + offset, gain, yerr=error, fmt="none", ecolor="black", elinewidth=0.7, capsize=1.5)
        mark = 100 * claims()[claim].low
        ax.axhline(mark, color="black", linewidth=0.8, linestyle=(0, (4, 2)) if claim == "C5" else (0, (1, 1.5)))
        ax.annotate(f"paper {mark:.1f} %", (0, mark), xycoords=("axes fraction", "data"), xytext=(2, 1.5),
                    textcoords="offset points", fontsize=6, path_effects=parts.halo())  # fmt: skip
    ax.axhline(0, color=style.colour("ulysses"), linewidth=1)
    ax.set_xticks(rows, [style.label(str(m)).replace(" QKV", "").replace(", ", ",\n") for m in others.index])
    ax.set_ylabel("%")
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("attention: solid · whole clip: light")


def _amdahl(ax: Axes, best: pd.DataFrame) -> None:
    """The clip's gain by the attention's: measured with intervals, and the line that the attention's share predicts."""
    share = float(best["self_attention_share"]["ulysses"])
    attention, clip = claims()["C5"].low, claims()["C4"].low
    others = best.drop(index="ulysses")
    reach = max([1 + attention, *(float(x[1]) for x in others["attention_speedup_interval"])])
    start = min([1.0, *(float(x[0]) for x in others["attention_speedup_interval"])])
    x = np.linspace(start, 1 + 1.4 * (reach - 1), 100)
    # The share that the paper's two gains imply: Amdahl's law, solved for it.
    implied = (1 - 1 / (1 + clip)) / (1 - 1 / (1 + attention))
    grey: dict[str, Any] = {"color": "#7F7F7F", "linewidth": 0.8, "linestyle": (0, (3, 2))}
    for of, line in ((share, {"color": "black", "linewidth": 1}), (implied, grey)):
        ax.plot(100 * (x - 1), 100 * (1 / (1 - of + of / x) - 1), **line)
    end = (100 * (x[-1] - 1), 100 * (1 / (1 - share + share / x[-1]) - 1))
    ax.annotate(f"share {100 * share:.0f} %", end, xytext=(0, 3), textcoords="offset points", ha="right", fontsize=6)
    for method, case in others.iterrows():
        look = parts.method_look(str(method))
        across, up = float(case["attention_speedup_vs_ulysses"]), float(case["speedup_vs_ulysses"])
        spans = [
            ([[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]])
            for value, (low, high) in ((across, case["attention_speedup_interval"]), (up, case["speedup_interval"]))
        ]
        ax.errorbar(100 * (across - 1), 100 * (up - 1), xerr=spans[0], yerr=spans[1], color=look["color"],
                    marker=look["marker"], linestyle="", elinewidth=0.7, markersize=4.5)  # fmt: skip
    ax.plot(100 * attention, 100 * clip, marker="*", color="black", markersize=7, linestyle="")
    ax.annotate(
        f"paper, share {100 * implied:.0f} %",
        (100 * attention, 100 * clip),
        xytext=(3, -8),
        textcoords="offset points",
        fontsize=6,
    )
    ax.set_xlabel("attention's gain, %")
    ax.set_ylabel("clip's gain, %")
    ax.margins(y=0.12)
