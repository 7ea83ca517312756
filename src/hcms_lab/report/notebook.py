"""The one template of the notebooks of figures and tables: newest records in, picture out, no outputs kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hcms_lab.ground.paths import ROOT
from hcms_lab.report.registry import Exhibit, exhibits

if TYPE_CHECKING:
    import nbformat

RUN = """\
from hcms_lab.report.registry import exhibit

{name} = exhibit("{name}")
folder = {name}.newest()  # or any run's folder"""
ALL_RUNS = """\
from hcms_lab.report.registry import exhibit

{name} = exhibit("{name}")
folder = None  # it reads the committed records of every experiment"""
MAKE = """\
shown = {name}.of(folder)
{name}.save(shown)
shown"""
STILLS = """\
from IPython.display import Image, display

for picture in {name}.pictures(folder):
    display(Image(filename=picture, width=480))"""


def notebook(exhibit: Exhibit) -> nbformat.NotebookNode:
    """The notebook of one figure or table."""
    import nbformat

    command = f"python experiments/run.py +exp={exhibit.name}"
    text = f"# {exhibit.label}: {exhibit.title}\n\nReads records only; they come from `{command}`."
    code = [ALL_RUNS if exhibit.reads_all else RUN, MAKE, *([STILLS] if exhibit.stills else [])]
    book = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(text),
            *(nbformat.v4.new_code_cell(cell.format(name=exhibit.name)) for cell in code),
        ],
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"
    return book


def written(root: Path = ROOT) -> dict[Path, str]:
    """What each notebook's file should hold."""
    import nbformat

    return {
        root / "notebooks" / f"{name}.ipynb": nbformat.writes(notebook(exhibit)) + "\n"
        for name, exhibit in exhibits().items()
    }


def stale(root: Path = ROOT) -> dict[Path, str]:
    """Of these the notebooks that are missing or differ, with what they should hold."""
    return {
        path: text
        for path, text in written(root).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    }
