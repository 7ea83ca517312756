"""Write the generated parts of README.md anew from the committed records and tables.

    python experiments/readme.py            # rewrite
    python experiments/readme.py --check    # change nothing; exit status 1 where a part is stale

The parts stand between `<!-- begin:NAME -->` and `<!-- end:NAME -->`: results, figures, comparison, hardware.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.paths import ROOT
from hcms_lab.report.readme import updated


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository; default the one this script lies in")
    arguments = parser.parse_args(argv)
    path = arguments.root / "README.md"
    if not path.is_file():
        print(f"error: {path} is missing", file=sys.stderr)
        return 2
    text = path.read_text(encoding="utf-8")
    try:
        fresh = updated(text, arguments.root)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if fresh == text:
        print("README.md is up to date")
        return 0
    if arguments.check:
        diff = difflib.unified_diff(text.splitlines(), fresh.splitlines(), "README.md", "make readme", lineterm="", n=0)
        print("\n".join(diff))
        print("error: README.md is stale: run make readme", file=sys.stderr)
        return 1
    path.write_text(fresh, encoding="utf-8")
    print("wrote README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
