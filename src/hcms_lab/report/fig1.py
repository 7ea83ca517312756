"""Figure 1: one attention layer as lanes over time, from the traces of the run, beside the simulator's picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from hcms.methods import METHODS
from hcms.schedule.cost import predict
from hcms.schedule.ideal import IdealCosts
from hcms.schedule.schedule import COMM, COMPUTE
from hcms.schedule.timeline import Span, Timeline
from hcms_lab.ground import traces
from hcms_lab.ground.errors import UsageError
from hcms_lab.report import parts, style
from hcms_lab.report.registry import register
from hcms_lab.report.stats import fixed_cuts, measured, overlapping
from hcms_lab.report.words import short_cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASE = "ulysses"
KINDS = {"exchange": "exchange Q, K, V", "attend": "attention", "return": "return O", "rotate": "pass K, V on"}
COPIES = "copies on the device"  # every other kind: packing, unpacking, arranging
COMMUNICATES = ("exchange", "return", "rotate")
LANES = {
    COMPUTE: "attention",
    "compute-2": "attention, 2",
    COMM: "link",
    "comm-in": "link, in",
    "comm-out": "link, out",
}


class Run(NamedTuple):
    """A timeline to draw, its case, and how many times as fast as its kernel's Ulysses it is."""

    case: pd.Series
    timeline: Timeline
    speedup: float
    predicted: Timeline | None


@register(
    "fig1", "One attention layer as lanes over time", beside=("native-host", "ghost", "ghost-sm", "shared", "emulated")
)
def fig1(records: pd.DataFrame) -> Figure:
    """Serial Ulysses above every HCMS that left a trace; measured on the left, on the right as the simulator sees it.

    With several kernels each has a column of its own, measured, and the simulator none. The simulator shows what the
    run's own calibration predicted; of a run that kept none of it, an ideal machine, from two numbers of the serial
    run: its attention time and its communication ratio. Lanes are those of the call nearest the median, on rank 0; the
    speedup is that of the medians.

    Args:
        records: of a run whose folder holds its traces (`records.attrs["folder"]`).

    Raises:
        UsageError: no correct case of Ulysses and HCMS, or no trace of one.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    cases = parts.of_one_link(measured(records))
    cases = cases[cases["seq_len"] == cases["seq_len"].max()]
    cases = cases[cases["world_size"] == cases["world_size"].max()]
    cases.attrs = dict(records.attrs)
    kernels = {str(kernel): _runs(its, cases.attrs) for kernel, its in cases.groupby("kernel", sort=False)}
    if not kernels:
        raise UsageError(f"figure 1 needs {BASE} and hcms, and these records hold no correct case of either")
    columns = [[(run, run.timeline) for run in runs] for runs in kernels.values()]
    if len(kernels) == 1:
        columns.append([(run, _simulated(run, columns[0][0][0].case)) for run, _ in columns[0]])
    height = max(map(len, columns))
    with style.use():
        lanes = [max(len(_rows(column[i][1])) for column in columns if i < len(column)) for i in range(height)]
        fig, axes = plt.subplots(
            height, len(columns), figsize=(style.PAGE_IN, 0.9 + 0.55 * height + 0.26 * sum(lanes)), sharex=True,
            squeeze=False, height_ratios=[count + 0.5 for count in lanes],
        )  # fmt: skip
        drawn: set[str] = set()
        for column, its in zip(axes.T, columns, strict=True):
            for ax in column[len(its) :]:
                ax.set_visible(False)
            for ax, (run, timeline) in zip(column, its, strict=False):
                drawn |= _lanes(ax, timeline)
                ax.set_title(_title(run, timeline, several=len(kernels) > 1))
            column[len(its) - 1].set_xlabel("ms since the call began")
            column[len(its) - 1].tick_params(labelbottom=True)
        reach_ms = max(timeline.duration_ms for column in columns for _, timeline in column)
        axes[0, 0].set_xlim(0, 1.15 * reach_ms)
        ratios = [runs[0].case for runs in kernels.values()]
        rho = ", ".join(
            f"ρ = {case['comm_ratio']:.2f}" + (f" ({case['kernel']})" if len(ratios) > 1 else "") for case in ratios
        )
        parts.headline(fig, f"{parts.where(cases)} · {parts.layer(cases)}", rho)
        handles = [Patch(color=_colour(kind), label=text) for kind, text in KINDS.items() if kind in drawn]
        if drawn - set(KINDS):
            handles.append(Patch(color=style.KIND_COLOURS["other"], label=COPIES))
        if len(kernels) == 1:
            handles.append(Patch(facecolor="#999999", label="simulated", **style.PREDICTED))
        fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        fig.set_label(_alt(kernels))
    return fig


def _runs(cases: pd.DataFrame, attrs: dict) -> list[Run]:
    """Ulysses and each overlapping method at its fastest fixed cut that has a trace, in the order of the methods.

    Raises:
        UsageError: one of the two is missing.
    """
    folder = Path(str(attrs.get("folder", "")))
    by_latency = cases.sort_values("latency_ms")
    fixed = fixed_cuts(by_latency)
    runs: list[Run] = []
    for method in [BASE, *overlapping()]:
        some = fixed if (fixed["method"] == method).any() else by_latency
        case = next((case for _, case in some[some["method"] == method].iterrows()), None)
        if case is None:
            if method == BASE:
                raise UsageError(f"figure 1 needs {BASE} and hcms, and these records hold no correct case of {BASE}")
            continue
        path = traces.find(folder, case.to_dict())
        if path is None:
            raise UsageError(f"no trace {folder / traces.FOLDER / traces.name(case.to_dict())}: run +exp=fig1 again")
        base_ms = runs[0].case["latency_ms"] if runs else case["latency_ms"]
        predicted = traces.find_predicted(folder, case.to_dict())
        runs.append(
            Run(
                case,
                traces.read(path, case.to_dict()),
                float(base_ms) / float(case["latency_ms"]),
                traces.read(predicted, case.to_dict()) if predicted else None,
            )
        )
    if len(runs) < 2:
        wanted = " or ".join(overlapping())
        raise UsageError(f"figure 1 needs {BASE} and hcms, and these records hold no correct case of {wanted}")
    return runs


def _simulated(run: Run, serial: pd.Series) -> Timeline:
    if run.predicted is not None:
        return run.predicted
    costs = IdealCosts(float(serial["comm_ratio"]), int(serial["world_size"]), float(serial["attention_ms"]))
    return predict(run.timeline.schedule, costs)


def _title(run: Run, timeline: Timeline, *, several: bool) -> str:
    name = style.label(str(run.case["method"]))
    words = [
        name,
        *([short_cut(str(run.case["cut"]).removeprefix("auto:"))] if METHODS[run.case["method"]].cuts else []),
    ]
    if several:
        return f"{run.case['kernel']}: {' '.join(words)}" + (
            "" if run.case["method"] == BASE else f", ×{run.speedup:.2f}"
        )
    if timeline.source == "predicted":
        return "simulated" if run.predicted else "simulated, an ideal machine"
    return f"{' '.join(words)}, measured" + ("" if run.case["method"] == BASE else f": ×{run.speedup:.2f}")


def _alt(kernels: dict[str, list[Run]]) -> str:
    each = []
    for kernel, (serial, *others) in kernels.items():
        beside = ", ".join(f"{style.label(str(run.case['method']))} {run.case['latency_ms']:.3g} ms" for run in others)
        each.append(f"{kernel}: serial Ulysses {serial.case['latency_ms']:.3g} ms, {beside}")
    return f"Lanes over time of one attention layer. {'; '.join(each)}."


def _colour(kind: str) -> str:
    return style.KIND_COLOURS.get(kind, style.KIND_COLOURS["other"])


def _lane(span: Span) -> str:
    """What communicates is on the link even where one lane carries all."""
    on_compute = span.op.lane.startswith(COMPUTE)
    return COMM if on_compute and span.op.kind in COMMUNICATES else span.op.lane


def _rows(timeline: Timeline) -> list[str]:
    """The lanes that a timeline uses: attention's above the link's, those without a label last."""
    used = dict.fromkeys(map(_lane, timeline.spans))
    return [lane for lane in LANES if lane in used] + [lane for lane in used if lane not in LANES]


def _lanes(ax: Axes, timeline: Timeline) -> set[str]:
    """Bars by lane, attention above the link; returns the kinds that were drawn."""
    lanes = _rows(timeline)
    is_predicted = timeline.source == "predicted"
    look = {"edgecolor": "white", "linewidth": 0.7}
    if is_predicted:
        look = style.PREDICTED | look
    cut, end_ms = timeline.schedule.cut, timeline.duration_ms
    for span in timeline.spans:
        y, colour = lanes.index(_lane(span)), _colour(span.op.kind)
        thin = span.duration_ms < 0.01 * end_ms  # an edge would hide it
        ax.barh(
            y,
            span.duration_ms,
            left=span.begin_ms,
            height=0.72,
            color=colour,
            **(look | {"linewidth": 0.0} if thin else look),
        )
        if span.op.kind == "attend" and len(cut) > 1 and span.duration_ms > 0.03 * end_ms:
            middle = (span.begin_ms + span.end_ms) / 2
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1.0} if is_predicted else None
            heads = str(cut[span.op.chunk])
            ax.text(middle, y, heads, ha="center", va="center", color="white", fontsize=7, bbox=box)
    ax.set_yticks(range(len(lanes)), [LANES.get(lane, lane) for lane in lanes])
    ax.set_ylim(len(lanes) - 0.5, -0.5)
    ax.axvline(end_ms, color="black", linewidth=0.8)
    digits = 0 if end_ms >= 20 else 1
    ax.text(end_ms, (len(lanes) - 1) / 2, f" {end_ms:.{digits}f} ms", ha="left", va="center", fontsize=7)
    ax.grid(axis="y", visible=False)
    return {span.op.kind for span in timeline.spans}
