"""Build the results page: one HTML file with all figures, tables and notebooks, which opens from disk.

    hcms-lab page                  # site/index.html, from the committed records
    hcms-lab page --out page.html
    hcms-lab page --own            # this machine's newest runs stand in the place of committed ones

It changes no other file: what a notebook draws goes into the page.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from hcms_lab.ground.paths import ROOT


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=None, help="the file to write; default site/index.html")
    parser.add_argument("--own", action="store_true", help="read this machine's newest runs before committed ones")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository; default the one this code lies in")


def run(arguments: Namespace) -> int:
    from hcms_lab.report.page import build

    out = arguments.out or arguments.root / "site" / "index.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    up = Path(os.path.relpath(arguments.root, out.parent)).as_posix()
    page = build(arguments.root, up=up, own=arguments.own)
    out.write_text(page, encoding="utf-8")
    print(f"wrote {os.path.relpath(out)} ({len(page) / 2**20:.1f} MiB)")
    return 0
