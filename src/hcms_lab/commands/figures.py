"""Draw every figure of the committed records: into figures/, of each other link that has a run in a file of its own.

    hcms-lab figures [fig3 ...]

Notebooks draw this machine's newest run where it has one; this reads committed runs alone, so that what is published
is the same everywhere. `figures/fig3-emulated.png` stands beside `figures/fig3.png` where the newest run is a GPU's.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import NAMED_BY, by_link


def options(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to draw; all where none is named")


def run(arguments: Namespace) -> int:
    from hcms_lab.report import style
    from hcms_lab.report.parts import PLACES
    from hcms_lab.report.registry import exhibits

    os.environ[NAMED_BY] = "committed"
    figures = {name: exhibit for name, exhibit in exhibits().items() if exhibit.is_figure}
    if unknown := [name for name in arguments.names if name not in figures]:
        raise UsageError(f"{unknown[0]}: no such figure; choose of {', '.join(figures)}")
    for name in arguments.names or figures:
        figure = figures[name]
        newest = figure.newest()
        drawn = figure.save(figure.of(newest))
        runs = {link: folder for link, folder in by_link(name).items() if link in PLACES}
        has_link = newest in runs.values()
        for link, folder in runs.items():
            if has_link and folder != newest and link in figure.beside:
                shown = figure.of(folder)
                drawn += style.save(shown, f"{name}-{link}", alt=shown.get_label(), vector=False)
        for path in drawn:
            print(f"wrote {os.path.relpath(path, Path.cwd())}", flush=True)
    return 0
