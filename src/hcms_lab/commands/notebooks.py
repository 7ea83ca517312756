"""Write the notebooks of all figures and tables from one template, `hcms_lab.report.notebook`.

hcms-lab notebooks            # rewrite notebooks/<name>.ipynb
hcms-lab notebooks --check    # change nothing; exit status 1 where one differs from the template
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="only say whether a notebook differs from the template")


def run(arguments: Namespace) -> int:
    from hcms_lab.report.notebook import stale

    differing = stale()
    for path, text in differing.items():
        if arguments.check:
            print(f"error: {path.name} differs from its template: run hcms-lab notebooks", file=sys.stderr)
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote notebooks/{path.name}")
    return 1 if arguments.check and differing else 0
