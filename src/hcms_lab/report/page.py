"""All results as one static HTML page that opens from disk: claims, figures, hardware, tables, notebooks.

Pictures are inside the page, so that it can be moved or sent; only links to PDFs and records point beside it. It is
made of what the repository holds and shows what is missing as such.
"""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import committed_folders
from hcms_lab.ground.paths import ROOT
from hcms_lab.report import compare, readme, style
from hcms_lab.report.registry import exhibits
from hcms_lab.report.tables import to_markdown

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from nbformat import NotebookNode

TITLE = "HCMS: head-chunked sequence parallelism, reproduced"
LEAD = (
    "Sequence-parallel attention whose communication hides behind computation, measured on real ranks and predicted "
    "for other hardware. Every number comes from the records in the repository; measured and predicted are kept apart."
)
FIRST = "fig3"  # the figure that stands under the claims
_NO_ALT = "No description has been provided for this image"  # what nbconvert writes


@dataclass
class Part:
    """One thing in a section; what is empty is not shown."""

    title: str = ""
    id: str = ""
    note: str = ""
    image: str = ""
    narrow: bool = False  # a picture of a column's width, which fits a small window
    full_size: str = ""  # the picture's file, to enlarge it on a small window
    alt: str = ""
    caption: str = ""
    command: str = ""
    links: list[dict[str, str]] = field(default_factory=list)
    html: str = ""


@dataclass
class Section:
    title: str
    id: str
    parts: list[Part]


def build(root: Path = ROOT, *, up: str = "..", own: bool = False) -> str:
    """The page as HTML. No file of the repository changes.

    Args:
        root: the repository.
        up: from the page's folder to `root`, for links.
        own: judge and draw this machine's newest runs where there are any, and not committed ones alone.
    """
    import jinja2
    from markupsafe import Markup
    from pygments.formatters import HtmlFormatter

    notebooks = _notebooks(root, own)
    sections = [
        Section("Claims", "claims", [Part(html=_markdown(readme.results(root, own=own), up))]),
        Section("Figures", "figures", _figures(root, up)),
        Section("Hardware", "hardware", _hardware(root, up)),
        Section("Tables", "tables", _tables(root, up)),
        Section("Notebooks", "notebooks", notebooks),
        Section("Everything, with its command", "index", [Part(html=_markdown(readme.figures(root), up))]),
    ]
    first = next((part for part in sections[1].parts if part.id == FIRST), None)
    if first is not None:  # the first screen: what was claimed, and one figure of it
        sections[1].parts.remove(first)
        sections[0].parts.append(first)
    sections = [section for section in sections if section.parts]
    for section in sections:
        for part in section.parts:
            part.html = Markup(part.html)  # ours: from Markdown or nbconvert; all other text is escaped
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=TITLE,
        lead=LEAD,
        sections=sections,
        code_style=Markup(HtmlFormatter().get_style_defs(".highlight")),
        footer=_footer(root),
    )


def _figures(root: Path, up: str) -> list[Part]:
    parts = []
    for experiment in readme.experiments(root):
        png = root / "figures" / f"{experiment.name}.png"
        if png.is_file():
            parts.append(_picture(png, experiment.label, experiment.what, up, root, command=experiment.command))
        elif experiment.name in exhibits() and exhibits()[experiment.name].is_figure:
            parts.append(
                Part(experiment.label, experiment.name, note=f"{experiment.what} {readme.NOT_YET.capitalize()}.")
            )
    return parts


def _picture(png: Path, label: str, what: str, up: str, root: Path, *, command: str = "") -> Part:
    from PIL import Image

    with Image.open(png) as image:
        alt = str(image.info.get("Description", "")) or f"{label}: {what}"
    pdf = png.with_suffix(".pdf")
    links = [
        {"href": f"{up}/{path.relative_to(root).as_posix()}", "text": path.suffix[1:].upper()}
        for path in (pdf, png)
        if path.is_file()
    ]
    source = _embedded(png.read_bytes())
    return Part(
        label, png.stem, image=source, full_size=links[-1]["href"], alt=alt, caption=what, command=command, links=links
    )


def _hardware(root: Path, up: str) -> list[Part]:
    """Which hardware there is, and every experiment that more than one has, side by side."""
    import matplotlib.pyplot as plt

    parts = [Part(html=_markdown(readme.hardware(root), up))]
    for experiment in readme.experiments(root):
        folders = list(committed_folders(experiment.name, root).values())
        if len(folders) < 2:
            continue
        try:
            comparison = compare.compare(compare.load(folders))
        except UsageError as error:
            parts.append(Part(f"{experiment.label} side by side", f"{experiment.name}-compared", note=f"{error}."))
            continue
        figure = comparison.figure()
        with io.BytesIO() as file, style.use():
            figure.savefig(file, format="png")
            picture = _embedded(file.getvalue())
        plt.close(figure)
        tables = "".join(
            f"<h4>{group.title}</h4>{_markdown(to_markdown(group.table), up)}" for group in comparison.groups
        )
        notes = "".join(f'<p class="quiet">{note}.</p>' for note in comparison.notes)
        parts.append(
            Part(
                f"{experiment.label} side by side",
                f"{experiment.name}-compared",
                image=picture,
                narrow=True,
                alt=comparison.alt(),
                caption=f"{experiment.what} One colour a hardware; its own Ulysses is 1.",
                command=f"hcms-lab compare {experiment.name}",
                html=f"{notes}<details><summary>Numbers</summary>{tables}</details>",
            )
        )
    return parts


def _tables(root: Path, up: str) -> list[Part]:
    known = {experiment.name: experiment for experiment in readme.experiments(root)}
    parts = []
    for path in sorted((root / "paper_tables").glob("*.md")):
        experiment = known.get(path.stem)
        parts.append(
            Part(
                experiment.label if experiment else path.stem,
                f"{path.stem}-table",
                note=experiment.what if experiment else "",
                html=_markdown(path.read_text(encoding="utf-8"), up),
            )
        )
    return parts


def _notebooks(root: Path, own: bool) -> list[Part]:
    """Each notebook as it stands, folded; one without outputs is run first, and one that fails says why."""
    import nbformat
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", exclude_anchor_links=True)
    exporter.log.setLevel("ERROR")  # it warns of alternative texts that are added below
    known = {experiment.name: experiment for experiment in readme.experiments(root)}
    parts = []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        is_shown = any(cell.get("outputs") for cell in notebook.cells)
        if not is_shown and (why := _run(notebook, path.parent, own)):
            parts.append(Part(id=f"{path.stem}-notebook", note=f"{path.name} did not run: {why}"))
            continue
        body, _ = exporter.from_notebook_node(notebook)
        page = BeautifulSoup(body, "html.parser")
        experiment = known.get(path.stem)
        what = f"{experiment.label}: {experiment.what}" if experiment else path.stem.replace("_", " ").capitalize()
        for image in page.find_all("img"):
            if image.get("alt", _NO_ALT) in ("", _NO_ALT):
                image["alt"] = what
        for named in page.find_all(id=True):  # the same ids in every notebook would not be ids
            del named["id"]
        _fit_tables(page)
        html = f'<details class="notebook"><summary>{what}</summary>{page}</details>'
        parts.append(Part(id=f"{path.stem}-notebook", html=html))
    return parts


def _run(notebook: NotebookNode, where: Path, own: bool) -> str:
    """Run a notebook for its outputs; what it draws goes where it is then gone. Returns why it failed, or ""."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    with TemporaryDirectory() as elsewhere:
        env = {**os.environ, "HCMS_OUT": elsewhere} | ({} if own else {"HCMS_RUN": "committed"})
        client = NotebookClient(
            notebook,
            timeout=600,
            resources={"metadata": {"path": str(where)}},
            # A kernel on this machine warns of every client that could listen: not news, a line a notebook.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        try:
            client.execute(env=env)
        except CellExecutionError as error:
            return f"{error.ename}: {error.evalue}"
    return ""


def _markdown(text: str, up: str) -> str:
    """Markdown as HTML: links to the repository's files lead out of the page's folder, wide tables scroll."""
    import mistune
    from bs4 import BeautifulSoup

    html = mistune.html(text)
    assert isinstance(html, str)
    page = BeautifulSoup(html, "html.parser")
    for link in page.find_all("a", href=True):
        if not re.match(r"[a-z]+:|#|/", str(link["href"])):
            link["href"] = f"{up}/{link['href']}"
    _fit_tables(page)
    return str(page)


def _fit_tables(page: BeautifulSoup) -> None:
    """Tables scroll where they are too wide; on a phone, those of many columns show their rows as blocks instead."""
    for table in page.find_all("table"):
        # Focusable, so that the keyboard can scroll it too.
        table.wrap(page.new_tag("div", attrs={"class": "scroll", "tabindex": "0"}))
        labels = [head.get_text(strip=True) for head in table.select("thead tr:last-child th")]
        classes = [name for name, columns in (("stack", 3), ("wide", 7)) if len(labels) > columns]
        if not classes:
            continue
        table["class"] = " ".join(classes)
        for row in table.select("tbody tr"):
            for label, cell in zip(labels, row.find_all(["td", "th"]), strict=False):
                cell["data-label"] = label
                content = page.new_tag("span")
                content.extend(list(cell.contents))
                cell.append(content)


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _footer(root: Path) -> str:
    try:
        done = subprocess.run(
            ["git", "log", "-1", "--format=%h, %cs"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "Made by make page."
    return f"Made by make page at commit {done.stdout.strip()}."
