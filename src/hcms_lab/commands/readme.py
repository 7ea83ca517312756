"""Write the generated parts of README.md and MEASURED.md anew from the committed records and tables.

    hcms-lab readme            # rewrite
    hcms-lab readme --check    # change nothing; exit status 1 where a part is stale
    hcms-lab readme --own      # this machine's newest runs stand in for committed ones: to look at, not to commit

The parts stand between `<!-- begin:NAME -->` and `<!-- end:NAME -->`: results, figures, comparison, hardware.
"""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.paths import ROOT

PAGES = ("README.md", "MEASURED.md")  # with generated parts


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="only say whether README.md is stale")
    parser.add_argument("--own", action="store_true", help="read this machine's newest runs before committed ones")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository; default the one this code lies in")


def run(arguments: Namespace) -> int:
    from hcms_lab.report.readme import updated

    stale = False
    for name in PAGES:
        path = arguments.root / name
        if not path.is_file():
            if name == PAGES[0]:
                raise UsageError(f"{path} is missing")
            continue
        text = path.read_text(encoding="utf-8")
        fresh = updated(text, arguments.root, own=arguments.own)
        if fresh == text:
            print(f"{name} is up to date")
        elif arguments.check:
            stale = True
            diff = difflib.unified_diff(text.splitlines(), fresh.splitlines(), name, "make readme", lineterm="", n=0)
            print("\n".join(diff))
            print(f"error: {name} is stale: run make readme", file=sys.stderr)
        else:
            path.write_text(fresh, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if stale else 0
