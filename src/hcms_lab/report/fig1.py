"""Figure 1: one attention layer as lanes over time, from the traces of the run, beside the simulator's picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from hcms.schedule.cost import IdealCosts, predict
from hcms.schedule.schedule import COMM, COMM_OUT, COMPUTE, Op, Schedule
from hcms.schedule.timeline import Span, Timeline
from hcms_lab.ground.errors import UsageError
from hcms_lab.report import parts, style
from hcms_lab.report.stats import measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"exchange": "exchange Q, K, V", "attend": "attention", "return": "return O"}
LANES = {COMPUTE: "attention", COMM: "link", COMM_OUT: "link, out"}


def fig1(records: pd.DataFrame) -> Figure:
    """Serial Ulysses above HCMS; measured on the left, on the right the same schedules as the simulator sees them.

    The simulator gets two numbers of the serial run, its attention time and its communication ratio, so the right
    column of the HCMS row is a prediction. Lanes are those of the call nearest the median, on rank 0; the speedup is
    that of the medians.

    Args:
        records: of a run whose folder holds `traces/` (`records.attrs["folder"]`).

    Raises:
        UsageError: no correct case of `ulysses` and `hcms`, or no trace of one.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    cases = measured(records)
    longest = cases[cases["seq_len"] == cases["seq_len"].max()]
    rows = []
    for method in ("ulysses", "hcms"):
        found = longest[longest["method"] == method].sort_values("latency_ms")
        if found.empty:
            raise UsageError(f"figure 1 needs ulysses and hcms, and these records hold no correct case of {method}")
        rows.append(found.iloc[0])
    serial = rows[0]
    costs = IdealCosts(float(serial["comm_ratio"]), int(serial["world_size"]), float(serial["attention_ms"]))
    with style.use():
        fig, axes = plt.subplots(2, 2, figsize=style.size("page", 0.42), sharex=True, squeeze=False)
        for pair, case in zip(axes, rows, strict=True):
            ran = measured_timeline(Path(str(records.attrs.get("folder", ""))), case)
            told = predict(ran.schedule, costs)
            name = " ".join([style.label(str(case["method"])), *([str(case["cut"])] if case["cut"] else [])])
            _lanes(pair[0], ran)
            _lanes(pair[1], told)
            ratio = float(serial["latency_ms"]) / float(case["latency_ms"])
            gain = "" if case["method"] == "ulysses" else f": ×{ratio:.2f}"
            pair[0].set_title(f"{name}, measured{gain}")
            pair[1].set_title(f"{name}, simulated")
        for ax in axes[1]:
            ax.margins(x=0)
            ax.set_xlabel("ms since the call began")
        ratio = f"ρ = {float(serial['comm_ratio']):.2f}"
        parts.headline(fig, f"{parts.where(longest)} · {parts.layer(longest)} · {ratio}")
        colours = style.KIND_COLOURS
        handles: list[Patch] = [Patch(color=colours[kind], label=text) for kind, text in KINDS.items()]
        handles.append(Patch(facecolor="#999999", label="simulated", **style.PREDICTED))
        fig.legend(handles=handles, loc="outside lower center", ncols=4)
        ours = rows[1]
        fig.set_label(
            f"Lanes over time of one attention layer: serial Ulysses {serial['latency_ms']:.0f} ms above HCMS "
            f"{ours['latency_ms']:.0f} ms, where exchanges run beside attention; the simulator's picture beside each."
        )
    return fig


def measured_timeline(folder: Path, case: pd.Series) -> Timeline:
    """A case's most usual call on rank 0 from its Chrome trace, its Schedule rebuilt from what the trace says.

    Raises:
        UsageError: the run's folder holds no such trace.
    """
    ratio = "" if pd.isna(case["link_ratio"]) else f"-rho{case['link_ratio']:g}"
    name = f"{case['method']}-CUT-{int(case['world_size'])}x{int(case['seq_len'])}{ratio}.json"
    cut_text = str(case["cut"] or "").removeprefix("auto:")
    wanted = re.compile(r"\d+-" + re.escape(name).replace("CUT", re.escape(cut_text) or r"(whole|\d+)"))
    found = [path for path in sorted((folder / "traces").glob("*.json")) if wanted.fullmatch(path.name)]
    if not found:
        raise UsageError(f"no trace {folder}/traces/*-{name}: run python experiments/run.py +exp=fig1")
    events = json.loads(found[0].read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = []
    for event in (e for e in events if e["ph"] == "X"):
        kind, chunk = event["name"].split()
        args = event["args"]
        op = Op(kind, int(chunk), lanes[event["tid"]], tuple(args["after"]), args["tensors"])
        spans.append(Span(op, event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3))
    whole = (int(case["heads"]) // int(case["world_size"]),)
    cut = tuple(map(int, cut_text.split("-"))) if cut_text else whole
    schedule = Schedule(str(case["schedule"]), cut, tuple(span.op for span in spans))
    return Timeline(schedule, tuple(spans), max(span.end_ms for span in spans), "measured")


def _lanes(ax: Axes, timeline: Timeline) -> None:
    """Bars by lane, attention above the link; what communicates is on the link even where one lane carries all."""
    lanes = [COMPUTE, COMM] + [lane for lane in timeline.schedule.lanes if lane == COMM_OUT]
    hatched = {"edgecolor": "white", "linewidth": 0.7}
    if timeline.source == "predicted":
        hatched = style.PREDICTED | hatched
    end_ms = timeline.duration_ms
    for span in timeline.spans:
        lane = span.op.lane if span.op.kind == "attend" or span.op.lane != COMPUTE else COMM
        y = lanes.index(lane)
        colour = style.KIND_COLOURS[span.op.kind]
        ax.barh(y, span.duration_ms, left=span.begin_ms, height=0.72, color=colour, **hatched)
        if span.op.kind == "attend" and len(timeline.schedule.cut) > 1:
            middle = (span.begin_ms + span.end_ms) / 2
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1.0} if timeline.source == "predicted" else None
            heads = str(timeline.schedule.cut[span.op.chunk])
            ax.text(middle, y, heads, ha="center", va="center", color="white", fontsize=7, bbox=box)
    ax.set_yticks(range(len(lanes)), [LANES[lane] for lane in lanes])
    ax.set_ylim(len(lanes) - 0.5, -0.5)
    ax.axvline(end_ms, color="black", linewidth=0.8)
    ax.text(end_ms, (len(lanes) - 1) / 2, f" {end_ms:.0f} ms", ha="left", va="center", fontsize=7)
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, max(ax.get_xlim()[1], 1.15 * end_ms))
