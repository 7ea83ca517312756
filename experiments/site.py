"""Build the results page: one HTML file with all figures, tables and notebooks, which opens from disk.

python experiments/site.py                 # site/index.html
python experiments/site.py --out page.html
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hcms_lab.ground.paths import ROOT
from hcms_lab.report.page import build


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="the file to write; default site/index.html")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository; default the one this script lies in")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.root / "site" / "index.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    page = build(arguments.root, up=Path(os.path.relpath(arguments.root, out.parent)).as_posix())
    out.write_text(page, encoding="utf-8")
    print(f"wrote {os.path.relpath(out)} ({len(page) / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
