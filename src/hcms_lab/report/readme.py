"""The parts of the README that are written by the records: results, figure index, comparison, hardware.

Each stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->`; NAME is a key of `BLOCKS`. What lies outside the
markers is never touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from hcms_lab.ground import experiments as declared
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import (
    committed_folders,
    committed_runs,
    environment,
    hardware_name,
    judged_runs,
    newest_runs,
    records,
)
from hcms_lab.ground.paths import ROOT
from hcms_lab.report.parts import PLACES
from hcms_lab.report.registry import exhibits
from hcms_lab.report.table1 import short
from hcms_lab.report.table5 import leads
from hcms_lab.report.tables import to_markdown

NOT_YET = "not run yet"
_MARKED = re.compile(r"(<!-- begin:([\w-]+) -->\n)(.*?)(<!-- end:\2 -->)", re.DOTALL)


@dataclass(frozen=True)
class Experiment:
    """One `conf/exp/<name>.yaml`: its command and what it shows."""

    name: str
    command: str
    what: str

    @property
    def label(self) -> str:
        """`Figure 3`, `Table 1`, or the name."""
        return exhibits()[self.name].label if self.name in exhibits() else self.name


def experiments(root: Path = ROOT) -> list[Experiment]:
    """The experiments: figures first, then tables, then the others, each by number."""
    return [Experiment(e.name, e.command, e.title) for e in declared.experiments(root)]


def results(root: Path = ROOT, *, own: bool = False) -> str:
    """The claims against the committed records; a run of the reader's own counts only where it is asked for."""
    shown = short(partial(judged_runs, root=root, own=own))
    unpadded = re.sub(r"-{4,}", "---", re.sub(r" {2,}", " ", to_markdown(shown)))  # the README is read raw as well
    return f"{unpadded}\nWhere, how often, and by which rule: [Table 1](paper_tables/table1.md).\n"


def figures(root: Path = ROOT) -> str:
    """Figure or table, its command, how long that took and where, and the file that it ends in."""
    rows = []
    for experiment in experiments(root):
        if experiment.name not in exhibits():  # advice and calibration draw nothing
            continue
        files = [
            f"figures/{experiment.name}.pdf",
            f"figures/{experiment.name}.png",
            *(f"figures/{experiment.name}-{place}.png" for place in PLACES),
            f"paper_tables/{experiment.name}.md",
            *(f"paper_tables/{experiment.name}-{place}.md" for place in PLACES),
        ]
        there = [f"[{Path(file).name}]({file})" for file in files if (root / file).is_file()]
        notebook = f"notebooks/{experiment.name}.ipynb"
        if (root / notebook).is_file():
            there.append(f"[notebook]({notebook})")
        rows.append(
            {
                "": experiment.label,
                "what": experiment.what,
                "command": f"`{experiment.command}`",
                "time": _time(experiment.name, root),
                "file": ", ".join(there) or NOT_YET,
            }
        )
    return to_markdown(pd.DataFrame(rows))


def comparison(root: Path = ROOT, *, own: bool = False) -> str:
    """Who is ahead of which peer: a row a point of every committed run of Table 5."""
    runs = newest_runs("table5", root) if own else committed_runs("table5", root)
    if not runs:
        return f"Table 5: {NOT_YET}.\n"
    rows = [leads(run).assign(on=hardware_name(run.attrs["folder"])) for run in runs]
    return to_markdown(pd.concat(rows, ignore_index=True))


def hardware(root: Path = ROOT) -> str:
    """The hardware with committed reference runs, a row each."""
    rows = []
    for slug in sorted(path.name for path in (root / "paper_tables" / "records").glob("*") if path.is_dir()):
        folders = sorted((root / "paper_tables" / "records" / slug).glob("*/records.jsonl"))
        if not folders:
            continue
        envs = [environment(file.parent) for file in folders]
        ranks = sorted({int(r) for file in folders for r in records(file)["world_size"].dropna().unique()})
        rows.append(
            {
                "hardware": hardware_name(folders[0].parent),
                "link": ", ".join(sorted({str(e["link"]) for e in envs if e.get("link") not in (None, "none")})),
                "ranks": ", ".join(map(str, ranks)),
                "experiments": ", ".join(
                    f"[{f.parent.name}]({f.parent.relative_to(root).as_posix()})" for f in folders
                ),
                "commit": ", ".join(sorted({str(e.get("commit"))[:9] for e in envs})),
            }
        )
    return to_markdown(pd.DataFrame(rows)) if rows else f"No committed records: {NOT_YET}.\n"


BLOCKS: dict[str, Callable[..., str]] = {
    "results": results,
    "figures": figures,
    "comparison": comparison,
    "hardware": hardware,
}
READS_RUNS = ("results", "comparison")  # blocks that can count this machine's own


def updated(text: str, root: Path = ROOT, *, own: bool = False) -> str:
    """`text` with every marked part written anew; with `own`, claims and comparison count this machine's newest runs.

    Raises:
        UsageError: a marker without its counterpart, an unknown name, or no marker at all.
    """
    begins, ends = re.findall(r"<!-- begin:([\w-]+) -->", text), re.findall(r"<!-- end:([\w-]+) -->", text)
    if begins != ends:
        raise UsageError(f"README markers do not pair up: begin {begins}, end {ends}")
    unknown = sorted(set(begins) - set(BLOCKS))
    if unknown or not begins:
        raise UsageError(f"README markers {unknown or 'are missing'}: known are {', '.join(BLOCKS)}")

    def write(name: str) -> str:
        return BLOCKS[name](root, own=own) if name in READS_RUNS else BLOCKS[name](root)

    return _MARKED.sub(lambda match: f"{match[1]}{write(match[2]).strip()}\n{match[4]}", text)


def _time(exp: str, root: Path) -> str:
    """How long the committed runs took: `2 min 41 s (2-core CPU)`, the hardware named where there are several."""
    taken = {}
    for folder in committed_folders(exp, root).values():
        wall_s = environment(folder).get("wall_s")
        if wall_s is not None:
            taken[hardware_name(folder)] = _duration(float(wall_s))
    if not taken:
        return "–" if committed_folders(exp, root) or (root / "paper_tables" / f"{exp}.md").is_file() else NOT_YET
    if len(taken) == 1:
        return next(iter(taken.values()))
    return "; ".join(f"{time} ({name})" for name, time in taken.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
