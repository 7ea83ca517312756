"""Figure 8: the fastest of Ulysses, Ring and HCMS by ranks and communication ratio, predicted as a map (C2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hcms.schedule.cost import predict
from hcms.schedule.cut import Cut, even, tapered
from hcms.schedule.ideal import IdealCosts
from hcms.schedule.schedule import ring, serial, two_lane
from hcms_lab.ground.cuts import recorded_cut
from hcms_lab.report import parts, style
from hcms_lab.report.closed_form import ring_hides_up_to
from hcms_lab.report.registry import register
from hcms_lab.report.stats import gains, measured, point_columns, ratio_of_medians

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = ("ulysses", "ring", "hcms")
RANKS = tuple(range(2, 9))
RATIOS = np.linspace(0.05, 0.75, 141)
WORTH = 0.05  # a gain over Ulysses below this leaves Ulysses the choice
CLOSE = 0.02  # a lead over the runner-up below this is drawn pale
HEADS_A_RANK = 5  # the full model on 8 ranks
CUTS = (even(HEADS_A_RANK, HEADS_A_RANK), tapered(HEADS_A_RANK, 3))

Overhead = Callable[[str, int], float]


def ideal_ms(method: str, ratio: float, ranks: int, cuts: tuple[Cut, ...] = CUTS, attention_ms: float = 1.0) -> float:
    """The simulator's time on an ideal link: no launch, no copy, no latency. Of `hcms` the best of `cuts`."""
    costs = IdealCosts(ratio, ranks, attention_ms)
    if method == "hcms":
        return min(predict(two_lane(cut), costs).duration_ms for cut in cuts)
    schedule = ring(ranks) if method == "ring" else serial((HEADS_A_RANK,), split_qkv=True)
    return predict(schedule, costs).duration_ms


def choice(times_ms: dict[str, float]) -> tuple[str, float]:
    """The method to take, and its lead over the runner-up as a share: Ulysses unless another gains `WORTH` on it."""
    fastest = min(times_ms, key=lambda m: times_ms[m])
    taken = fastest if times_ms["ulysses"] / times_ms[fastest] - 1 >= WORTH else "ulysses"
    if taken == "ulysses":
        return taken, CLOSE
    return taken, min(ms for m, ms in times_ms.items() if m != taken) / times_ms[taken] - 1


@register("fig8", "Who is fastest where, by ranks and ratio")
def fig8(records: pd.DataFrame) -> Figure:
    """Left: the map on an ideal link. Right: the same times what each method was measured to pay besides, where it was.

    Bars are predictions (5 heads a rank), points are measured at their own ratio: filled where the fastest is told from
    the runner-up by the 95 % interval, open where it is not.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    records = parts.of_one_kernel(records)
    points = list(measured_points(records))
    overhead = overheads(points)
    with style.use():
        fig, axes = plt.subplots(1, 2, figsize=style.size("page", 0.52), sharex=True, sharey=True)
        known = sorted({x.ranks for x in points})
        _map(axes[0], lambda method, ranks: 1.0, RANKS)
        axes[0].set_title("ideal link (simulator)")
        limits = [ring_hides_up_to(p) for p in RANKS]
        axes[0].plot(limits, RANKS, color="black", linewidth=0.9, linestyle=(0, (3, 2)))
        _map(axes[1], overhead, range(min(known), max(known) + 1) if known else ())
        paid = ", ".join(
            f"{style.label(m)} ×{np.median([overhead(m, p) for p in known]):.2f}" for m in ("hcms", "ring") if points
        )
        axes[1].set_title(f"times measured overhead: {paid}" if paid else "no measured overhead")
        for ax in axes:
            for x in points:
                look = {"marker": style.marker(x.taken), "markersize": 6, "markeredgewidth": 0.9}
                colour = style.colour(x.taken)
                if x.clear:
                    ax.plot(x.ratio, x.ranks, color=colour, markeredgecolor="black", **look)
                else:
                    ax.plot(x.ratio, x.ranks, color="white", markeredgecolor=colour, **look)
            ax.set_xlabel("communication ratio ρ of Ulysses")
            ax.set_yticks(RANKS)
            ax.set_xlim(0.04, 0.76)
            ax.grid(visible=False)
        axes[0].set_ylabel("ranks")
        cases = measured(records)
        parts.headline(
            fig,
            f"who is fastest where · points: {parts.where(cases)}",
            f"{parts.layer(cases)} · n = {int(cases['n'].min())}",
        )
        names = {"ulysses": f"Ulysses (no gain of {WORTH:.0%})".replace("%", " %"), "ring": "Ring", "hcms": "HCMS"}
        handles: list[Patch | Line2D] = [
            Patch(facecolor=style.colour(m), label=f"{name}, predicted", **style.PREDICTED) for m, name in names.items()
        ]
        handles += [
            Line2D([], [], linestyle="", marker=style.marker(m), color=style.colour(m), markeredgecolor="black",
                   markersize=6, label=f"{style.label(m)}, measured")
            for m in METHODS
        ]  # fmt: skip
        handles.append(Patch(facecolor="#BBBBBB", alpha=0.4, label="pale: lead below 2 %"))
        handles.append(
            Line2D(
                [], [], linestyle="", marker="o", color="white", markeredgecolor="black", label="open: not told apart"
            )
        )
        handles.append(
            Line2D([], [], color="black", linewidth=0.9, linestyle=(0, (3, 2)), label="Ring hides all up to here")
        )
        fig.legend(handles=handles, loc="outside lower center", ncols=3)
        won = pd.Series([x.taken for x in points], dtype=object).value_counts()
        each = ", ".join(f"{style.label(str(m))} at {count}" for m, count in won.items())
        fig.set_label(f"The fastest method by ranks and communication ratio. Of {len(points)} measured points: {each}.")
    return fig


class MeasuredPoint:
    """A point of the records: who was fastest, whether that is certain, and each method's time over the ideal one."""

    def __init__(self, best: dict[str, Any]) -> None:
        serial_case = best["ulysses"]
        self.ranks = int(serial_case["world_size"])
        self.ratio = float(serial_case["comm_ratio"])
        times_ms = {method: float(case["latency_ms"]) for method, case in best.items()}
        self.taken, _ = choice(times_ms)
        others = [m for m in times_ms if m != self.taken]
        rival = min(others, key=lambda m: times_ms[m])
        lead = ratio_of_medians(best[rival]["times_ms"], best[self.taken]["times_ms"])
        # Ulysses is taken where nothing beats it by WORTH: clear if the best rival surely does not.
        gain = ratio_of_medians(best["ulysses"]["times_ms"], best[rival]["times_ms"])
        self.clear = gain.high < 1 + WORTH if self.taken == "ulysses" else lead.low > 1
        cut = recorded_cut(str(best["hcms"]["cut"]).split(" or ")[0])
        attention_ms = float(serial_case["attention_ms"])
        self.overhead = {
            method: ms / ideal_ms(method, self.ratio, self.ranks, (cut,), attention_ms)
            for method, ms in times_ms.items()
        }


def measured_points(records: pd.DataFrame) -> Iterator[MeasuredPoint]:
    """The points at which all three methods gave correct results; HCMS as `gains` picks it."""
    cases = measured(records)
    columns = point_columns(cases)
    picked = {_key(case, columns): case for case in gains(cases, "ulysses").to_dict("records")}
    for _, point in cases.groupby(columns, dropna=False, sort=False):
        others = {case["method"]: case for case in point.to_dict("records") if case["method"] in ("ulysses", "ring")}
        ours = picked.get(_key(point.iloc[0], columns))
        if len(others) == 2 and ours is not None and 0 < float(others["ulysses"]["comm_ratio"]) < 1:
            yield MeasuredPoint(others | {"hcms": ours})


def _key(case: Any, columns: list[str]) -> tuple[str, ...]:
    return tuple(str(case[column]) for column in columns)


def overheads(points: list[MeasuredPoint]) -> Overhead:
    """Each method's measured time over its ideal one, the median over ratios; between rank counts interpolated."""
    known = sorted({p.ranks for p in points})

    def overhead(method: str, ranks: int) -> float:
        if not known:
            return 1.0
        at = [float(np.median([p.overhead[method] for p in points if p.ranks == k])) for k in known]
        return float(np.interp(ranks, known, at))

    return overhead


def _map(ax: Axes, overhead: Overhead, rows: Iterable[int]) -> None:
    """For each rank count a row of bars, one for each stretch of ratios with the same choice."""
    step = RATIOS[1] - RATIOS[0]
    for ranks in rows:
        paid = {method: overhead(method, ranks) for method in METHODS}
        taken = []
        for ratio in RATIOS:
            method, lead = choice({m: ideal_ms(m, float(ratio), ranks) * paid[m] for m in METHODS})
            taken.append((float(ratio), method, lead < CLOSE))
        for (method, close), stretch in groupby(taken, key=lambda x: x[1:]):
            ratios = [x[0] for x in stretch]
            ax.barh(
                ranks, ratios[-1] - ratios[0] + step, left=ratios[0] - step / 2, height=0.86,
                color=style.colour(method), alpha=0.3 if close else 0.75, **style.PREDICTED,
            )  # fmt: skip
