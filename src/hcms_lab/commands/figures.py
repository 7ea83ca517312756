"""Draw every figure and table of the committed records, of each other link that has a run in a file of its own.

    hcms-lab figures [fig3 table5 ...]

Notebooks draw this machine's newest run where it has one; this reads committed runs alone, so that what is published
is the same everywhere. `figures/fig3-emulated.png` stands beside `figures/fig3.png` where the newest run is a GPU's,
and `paper_tables/table5-native.md` beside `table5.md`.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import NAMED_BY, by_link


def options(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures and tables to draw; all where none is named")


def run(arguments: Namespace) -> int:
    from hcms_lab.report.parts import PLACES
    from hcms_lab.report.registry import exhibits

    os.environ[NAMED_BY] = "committed"
    known = exhibits()
    if unknown := [name for name in arguments.names if name not in known]:
        raise UsageError(f"{unknown[0]}: no such figure or table; choose of {', '.join(known)}")
    for name in arguments.names or known:
        exhibit = known[name]
        newest = exhibit.newest()
        drawn = exhibit.save(exhibit.of(newest))
        runs = {place: folder for place, folder in by_link(name).items() if place in PLACES}
        has_place = newest in runs.values()
        for place, folder in runs.items():
            if has_place and folder != newest and place in exhibit.beside:
                drawn += exhibit.save(exhibit.of(folder), place=place)
        for path in drawn:
            print(f"wrote {os.path.relpath(path, Path.cwd())}", flush=True)
    return 0
