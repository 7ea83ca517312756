"""The same experiment on several machines, side by side: one table and one figure, from records alone.

What may stand in one row is decided by `KEYS`: two cases are compared only where workload, shape, kernel, number
type, ranks, method and cut agree. Everything else becomes a group or a row of its own, and is said so.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hcms_lab.ground.cuts import chunks
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.experiments import axis
from hcms_lab.ground.load import committed_folders, environment, hardware_name, plan, records, reduced
from hcms_lab.ground.paths import NAME, ROOT
from hcms_lab.report import style
from hcms_lab.report.stats import overlapping, point_columns, ratio_of_medians

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUP = ["workload", "dtype", "kernel", "heads", "head_dim", "batch"]  # never in one table or one panel
AXIS_LABELS = {
    "seq_len": "tokens",
    "world_size": "ranks",
    "chunks": "chunks a rank",
    "ratio": "communication ratio ρ",
}
VALUES = ["latency_ms", "speedup_vs_ulysses", "chosen"]
WRAP_AT = 56  # characters that fit a column
FEW = 3  # machines that lines and colours tell apart; more get a row each


@dataclass
class Group:
    """Cases that may be compared: one workload, kernel and number type. `table` has a column of numbers a machine."""

    title: str
    table: pd.DataFrame
    cases: pd.DataFrame


@dataclass
class Comparison:
    """The outcome: groups with a table each, the figure's axis, and what a reader must know (`notes`)."""

    exp: str
    axis: str
    labels: list[str]
    groups: list[Group]
    notes: list[str] = field(default_factory=list)

    def figure(self) -> Figure:
        """Speedup over `ulysses`, a panel a group, 95 % intervals; predictions hollow.

        A few machines are lines along the axis, a colour each; many are rows, a colour a method.
        """
        import matplotlib.pyplot as plt

        with style.use():
            fig, axes = plt.subplots(len(self.groups), 1, squeeze=False)
            colours = style.hardware_colours(self.labels)
            heights_in = []
            for ax, group in zip(axes[:, 0], self.groups, strict=True):
                if _many(group):
                    heights_in.append(1.0 + 0.36 * _rows(ax, group, self.axis))
                else:
                    lines = _panel(ax, group, self.axis, colours)
                    heights_in.append(2.3 + 0.14 * lines)  # a panel, and its legend below it
            axes[0, 0].get_gridspec().set_height_ratios(heights_in)
            wide = any(map(_many, self.groups))  # machines' names stand beside their rows
            fig.set_size_inches(style.PAGE_IN if wide else style.COLUMN_IN, sum(heights_in))
        return fig

    def alt(self) -> str:
        """A sentence that says what the figure shows."""
        best = [
            f"{label} up to ×{speedups.max():.2f}"
            for label in self.labels
            if len(speedups := self._speedups(label)) and speedups.notna().any()
        ]
        return f"Speedup of HCMS over Ulysses in {self.exp} by {AXIS_LABELS[self.axis]}: {'; '.join(best)}."

    def _speedups(self, label: str) -> pd.Series:
        cases = pd.concat([group.cases for group in self.groups])
        return cases.loc[(cases["run"] == label) & (cases["method"] == "hcms"), "speedup_vs_ulysses"]


def find(arguments: Sequence[str], root: Path = ROOT) -> list[Path]:
    """Folders of records: a path as it is; an experiment's name as every committed run of it and the newest local one.

    Raises:
        UsageError: neither a path with records nor an experiment that has some.
    """
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if (path / "records.jsonl").is_file() or path.is_file():
            found.append(path)
            continue
        if not NAME.fullmatch(argument):
            raise UsageError(f"{argument}: neither a folder with records.jsonl nor an experiment that has records")
        latest = root / "outputs" / argument / "latest"
        here = [
            *committed_folders(argument, root).values(),
            *([latest] if (latest / "records.jsonl").is_file() else []),
        ]
        if not here:
            raise UsageError(f"{argument}: neither a folder with records.jsonl nor an experiment that has records")
        found += here
    return list(dict.fromkeys(path.resolve() for path in found))


def load(paths: Iterable[Path]) -> dict[str, pd.DataFrame]:
    """Records by a label that tells the runs apart: the hardware's name, and the link or the folder where need be.

    Measured and predicted cases of one run get a label each, so that they never share a column.
    """
    runs: list[tuple[Path, str, pd.DataFrame]] = []
    for path in paths:
        table = records(path)
        hardware = hardware_name(path) if environment(path) else str(table["hardware"].iloc[0])
        for source, part in table.groupby("source", dropna=False, sort=False):
            suffix = "" if source == "measured" else f" ({source})"
            runs.append((Path(path), f"{hardware}{suffix}", part))
    labels = [label for _, label, _ in runs]
    for describe in (lambda path, table: _link(table), lambda path, table: path.name):
        labels = [
            f"{label}, {describe(path, table)}" if labels.count(label) > 1 else label
            for label, (path, _, table) in zip(labels, runs, strict=True)
        ]
    return {
        label if labels.count(label) == 1 else f"{label} #{i}": table
        for i, (label, (_, _, table)) in enumerate(zip(labels, runs, strict=True), start=1)
    }


def compare(runs: Mapping[str, pd.DataFrame]) -> Comparison:
    """Put runs of one experiment beside each other.

    Args:
        runs: records by label, as `load` returns them.

    Raises:
        UsageError: no run, runs of different experiments, or nothing correct to compare.
    """
    if not runs:
        raise UsageError("no run to compare")
    exps = {label: "/".join(sorted(set(table["exp"].dropna()))) for label, table in runs.items()}
    if len(set(exps.values())) > 1:
        which = ", ".join(f"{label} is {exp}" for label, exp in exps.items())
        raise UsageError(f"runs of different experiments are not compared: {which}")
    exp = next(iter(exps.values()))
    x = axis(exp).replace("comm_", "")  # the ratio that the link was set to, where it was
    cases = pd.concat([table.assign(run=label) for label, table in runs.items()], ignore_index=True)
    wrong = ~cases["ok"].fillna(False)
    unmeasured = ~wrong & cases["latency_ms"].isna()
    notes = [] if len(runs) > 1 else ["only one run so far: another machine's stands beside it once it is contributed"]
    for label in runs:
        for left_out, why in ((wrong, "failed or are wrong"), (unmeasured, "were refused and have no time")):
            if count := int(left_out[cases["run"] == label].sum()):
                notes.append(f"{count} cases of {label} {why}: left out")
    cases = cases[~wrong & ~unmeasured].copy()
    if cases.empty:
        raise UsageError("no correct case in any of these runs")
    cases["chunks"] = [chunks(cut) for cut in cases["cut"]]
    cases["plan"] = [plan(cut) for cut in cases["cut"]]
    cases["ratio"] = cases["link_ratio"].fillna(cases["comm_ratio"].round(2))
    # One link belongs to the machine; several make groups, or are the axis.
    sweeps = x != "ratio" and bool((cases.groupby("run")["link_ratio"].nunique() > 1).any())

    groups, common = [], 0
    for values, part in cases.groupby([*GROUP, "ratio"] if sweeps else GROUP, dropna=False, sort=True):
        present = [label for label in runs if (part["run"] == label).any()]
        title = "{}, {}, {}, {:g} heads of {:g}, batch {:g}".format(*values[: len(GROUP)])
        title += f", ρ {values[-1]:g}" if sweeps else ""
        groups.append(Group(title, _table(part, x, present), part))
        absent = [label for label in runs if label not in present]
        if absent:
            notes.append(f"{title}: no such case from {', '.join(absent)}; compare speedups, not times, across groups")
        shared = int(groups[-1].table[present].notna().sum(axis=1).gt(1).sum()) if len(present) > 1 else 0
        common += shared
        apart = int(groups[-1].table[present].isna().any(axis=1).sum()) if len(present) > 1 else 0
        if apart:
            notes.append(f"{title}: {apart} rows are not from every machine (other ranks, cuts or lengths): not mixed")
    for label, table in runs.items():
        if less := reduced(table.attrs["folder"]) if table.attrs.get("folder") else "":
            notes.append(f"{label} is a reduced run: {less}")
    if len(runs) > 1 and not common:
        notes.insert(0, "no case in common: no workload, shape, kernel, method and cut is in two of these runs")
    return Comparison(exp, x, list(runs), groups, notes)


def _table(part: pd.DataFrame, x: str, labels: list[str]) -> pd.DataFrame:
    """A row a case, a column a machine: latency, speedup over that machine's own `ulysses`, the cut that auto chose."""
    chosen = [cut.partition(":")[2] if p == "auto" else "" for cut, p in zip(part["cut"], part["plan"], strict=True)]
    part = part.assign(cut=part["plan"].fillna("–"), chosen=chosen)
    # The link belongs to the machine, unless the experiment sweeps it.
    keys = ["world_size", *(["ratio"] if x == "ratio" else []), "seq_len", "method", "cut"]
    part = part.sort_values("latency_ms").drop_duplicates([*keys, "run"])
    wide = part.pivot(index=keys, columns="run", values=VALUES)
    order = {method: i for i, method in enumerate(style.in_order(part["method"]))}
    rows = sorted(wide.index, key=lambda key: (*key[:-2], order[key[-2]], key[-1]))
    table = pd.DataFrame(rows, columns=pd.Index(keys))
    for label in labels:
        table[label] = [
            None if pd.isna(ms) else f"{ms:.2f} ms" + (f" (×{x:.2f})" if x == x else "") + (f" {cut}" if cut else "")
            for ms, x, cut in zip(*(wide[value][label].reindex(rows) for value in VALUES), strict=True)
        ]
    names = {"world_size": "ranks", "seq_len": "tokens", "ratio": "ρ"}
    return table.astype({"world_size": int, "seq_len": int}).rename(columns=names)


def _shown(group: Group) -> pd.DataFrame:
    """The overlapping methods' cases, and Ring's; the baseline is the line at 1."""
    methods = (*overlapping(), "ring")
    return group.cases[group.cases["method"].isin(methods) & group.cases["speedup_vs_ulysses"].notna()]


def _many(group: Group) -> bool:
    return _shown(group)["run"].nunique() > FEW


def _rows(ax: Axes, group: Group, x: str) -> int:
    """Draw one group of many machines, a row each: every method's best at the far end of the axis, and its range along
    it; returns how many rows there are."""
    cases = _shown(group).dropna(subset=[x])
    far = cases.sort_values(x).groupby("run").last()
    ax.axvline(1.0, color="black", linewidth=0.8)
    named: set[str] = set()  # in the legend
    machines, methods = list(dict.fromkeys(cases["run"])), style.in_order(cases["method"])
    for row, run in enumerate(machines):
        for number, method in enumerate(methods):
            part = cases[(cases["run"] == run) & (cases["method"] == method)]
            if part.empty:
                continue
            line = part.loc[part.groupby(x)["speedup_vs_ulysses"].idxmax()].sort_values(x)
            speedups, at = line["speedup_vs_ulysses"], row + 0.2 * (number - (len(methods) - 1) / 2)
            colour = style.colour(str(method))
            ax.plot([speedups.min(), speedups.max()], [at, at], color=colour, linewidth=1.0, alpha=0.5)
            face = "white" if (part["source"] == "predicted").all() else colour
            look: dict[str, Any] = {"color": colour, "marker": style.marker(str(method)), "linestyle": "none"}
            there = speedups[line[x] == far[x][run]]
            ax.plot(there, [at] * len(there), markerfacecolor=face, **look)
            ax.plot([], [], label=style.label(str(method)) if method not in named else None, **look)
            named.add(method)
    names = [f"{run}: {far['link'][run]} link, {far[x][run]:,g}" for run in machines]
    ax.set_yticks(range(len(machines)), names)
    ax.set_ylim(len(machines) - 0.5, -0.5)
    ax.set_xlabel(f"speedup over Ulysses at the {AXIS_LABELS[x]} named; over all: line")
    ax.set_title("\n".join(textwrap.wrap(group.title, WRAP_AT)))
    ax.legend(loc="upper left", bbox_to_anchor=(0.0, -1.5 / len(machines)), ncols=len(methods), borderaxespad=0.0)
    return len(machines)


def _panel(ax: Axes, group: Group, x: str, colours: Mapping[str, str]) -> int:
    """Draw one group; returns how many lines its legend has."""
    cases = _shown(group)
    ax.axhline(1.0, color="black", linewidth=0.8)
    single = cases[x].nunique() == 1
    for position, ((run, method), part) in enumerate(cases.groupby(["run", "method"], sort=False)):
        if x != "chunks" and part["plan"].notna().any():
            # One cut a line, the best of those that reach furthest along the axis, and the legend names it.
            plans = part.groupby("plan").agg(points=(x, "nunique"), mean=("speedup_vs_ulysses", "mean"))
            best = plans.sort_values(["points", "mean"]).index[-1]
            part = part[part["plan"] == best]
        name = f"{run}: {style.label(str(method))}"
        cuts = sorted(set(part["plan"].dropna()))
        if len(cuts) == 1:
            name += f" {cuts[0]}"
        name = "\n".join(textwrap.wrap(name, WRAP_AT, subsequent_indent="  "))
        # Several ranks or lengths at one point: the panel shows the best, the table has them all.
        line = part.loc[part.groupby(x)["speedup_vs_ulysses"].idxmax()].sort_values(x)
        below, above = zip(*(_interval(group.cases, case) for _, case in line.iterrows()), strict=True)
        predicted = (part["source"] == "predicted").all()
        colour = colours[str(run)]
        look: dict[str, Any] = {"linestyle": "--" if method == "ring" else "-"}
        if predicted:
            look |= style.PREDICTED_LINE
        at = [position] if single else line[x]
        ax.plot(at, line["speedup_vs_ulysses"], color=colour, marker=style.marker(str(method)), label=name, **look)
        ax.errorbar(at, line["speedup_vs_ulysses"], yerr=(below, above), fmt="none", ecolor=colour)
    points = sorted(cases[x].unique())
    if single:
        ax.set_xticks([])
        ax.margins(x=0.2)
    elif len(points) <= 8:
        ax.set_xticks(points, _apart([f"{point:,g}" for point in points], points))
        ax.minorticks_off()
    label = AXIS_LABELS[x]
    ax.set_xlabel(f"{label}: {points[0]:,g}" if single else label)
    ax.set_ylabel("speedup over Ulysses")
    ax.set_title("\n".join(textwrap.wrap(group.title, WRAP_AT)))
    # Hardware names are long: below the panel they cost height and never width.
    ax.legend(loc="upper left", bbox_to_anchor=(-0.12, -0.24), borderaxespad=0.0)
    return sum(1 + text.count("\n") for text in ax.get_legend_handles_labels()[1])


def _interval(cases: pd.DataFrame, case: pd.Series) -> tuple[float, float]:
    """How far below and above a measured speedup over Ulysses its 95 % interval reaches; none of a prediction."""
    columns = point_columns(cases)  # the run among them
    same = (cases[columns].astype(str) == case[columns].astype(str)).all(axis=1)
    base = cases[same & (cases["method"] == "ulysses")]
    if base.empty or not isinstance(case["times_ms"], list) or not isinstance(base["times_ms"].iloc[0], list):
        return 0.0, 0.0
    speedup = ratio_of_medians(base["times_ms"].iloc[0], case["times_ms"])
    if speedup.low != speedup.low:
        return 0.0, 0.0
    return max(0.0, speedup.value - speedup.low), max(0.0, speedup.high - speedup.value)


def _apart(labels: list[str], points: Sequence[float]) -> list[str]:
    """Tick labels, empty where one would run into the one before it."""
    kept, last = [], float("-inf")
    for label, point in zip(labels, points, strict=True):
        fits = point - last > 0.025 * len(label) * (points[-1] - points[0])
        kept.append(label if fits else "")
        last = point if fits else last
    return kept


def _link(table: pd.DataFrame) -> str:
    """The link of a run in few words: `emulated link, ρ 0.25`."""
    kind = next(iter(table["link"].dropna()), "unknown")
    ratios = sorted(set(table["link_ratio"].dropna()))
    gbps = sorted({round(value, 3) for value in table["link_gbps"].dropna()})
    pace = f", ρ {_span(ratios)}" if ratios else f", {_span(gbps)} GB/s" if gbps else ""
    return f"{kind} link{pace}"


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}–{values[-1]:g}"


def file_name(title: str) -> str:
    """A group's title as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
