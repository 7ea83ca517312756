"""The paper's claims against the committed records, with every piece of evidence; rules: paper_tables/claims.csv.

    hcms-lab claims          # as Table 1 and the README have them
    hcms-lab claims --own    # this machine's newest runs stand in the place of committed ones

A reduced run (fewer rounds or points than its experiment's own) is judged nowhere.
"""

from __future__ import annotations

import shutil
import textwrap
from argparse import ArgumentParser, Namespace
from functools import partial


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--own", action="store_true", help="read this machine's newest runs before committed ones")


def run(arguments: Namespace) -> int:
    from hcms_lab.ground.load import judged_runs
    from hcms_lab.report.claims import claims
    from hcms_lab.report.table1 import findings

    width = min(shutil.get_terminal_size().columns, 100)
    for name, finding in findings(partial(judged_runs, own=arguments.own)).items():
        claim = claims()[name]
        print(f"{name}  {finding.verdict}")
        lines = [f"claim: {claim.statement}", f"paper: {claim.paper}"]
        lines += [f"{e.verdict}: {e.measured}, n = {e.n}, on {e.on}" for e in finding.evidence]
        for line in (*lines, f"predicted: {finding.predicted}"):
            print(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="      "))
    return 0
