"""Write the notebooks of figures and tables from one template: records in, figure out, no outputs kept.

Those that show more than their figure or table (`BY_HAND`) are written by hand.

python experiments/notebooks.py            # rewrite notebooks/<name>.ipynb
python experiments/notebooks.py --check    # change nothing; exit status 1 where one differs from the template
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

from hcms_lab.ground.paths import ROOT
from hcms_lab.report.figures import FIGURES, TABLES
from hcms_lab.report.readme import Experiment, experiments

FIGURE = (
    """\
from hcms_lab.ground import load
from hcms_lab.report import style
from hcms_lab.report.figures import FIGURES

folder = load.newest("{name}")  # or any run's folder
records = load.records(folder)""",
    """\
figure = FIGURES["{name}"](records)
style.save(figure, "{name}", alt=figure.get_label())
figure""",
)
TABLE = (
    """\
from hcms_lab.ground import load
from hcms_lab.report.figures import TABLES
from hcms_lab.report.tables import write_table

folder = load.newest("{name}")  # or any run's folder
records = load.records(folder)""",
    """\
table = TABLES["{name}"](records)
write_table("{name}", table, caption=table.attrs["caption"])
table""",
)
CLAIMS = (
    """\
from hcms_lab.report.figures import TABLES
from hcms_lab.report.tables import write_table""",
    """\
table = TABLES["{name}"]()  # reads the newest records of every experiment
write_table("{name}", table, caption=table.attrs["caption"])
table""",
)
BY_HAND = ("fig7", "table4", "table5")


def notebook(experiment: Experiment) -> nbformat.NotebookNode:
    """The notebook of one figure or table."""
    cells = FIGURE if experiment.name in FIGURES else CLAIMS if experiment.name == "table1" else TABLE
    text = f"# {experiment.label}\n\n{experiment.what}\n\nReads records only; they come from `{experiment.command}`."
    made = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(text),
            *(nbformat.v4.new_code_cell(code.format(name=experiment.name)) for code in cells),
        ],
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
    return made


def written(root: Path = ROOT) -> dict[Path, str]:
    """What each notebook's file should hold."""
    return {
        root / "notebooks" / f"{e.name}.ipynb": nbformat.writes(notebook(e)) + "\n"
        for e in experiments(root)
        if e.name in {*FIGURES, *TABLES} - {*BY_HAND}
    }


def main(argv: list[str]) -> int:
    stale = {p: text for p, text in written().items() if not p.exists() or p.read_text(encoding="utf-8") != text}
    if "--check" in argv:
        for path in stale:
            print(f"error: {path.name} differs from its template: run python experiments/notebooks.py", file=sys.stderr)
        return 1 if stale else 0
    for path, text in stale.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote notebooks/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
