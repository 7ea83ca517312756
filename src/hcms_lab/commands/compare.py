"""Runs of one experiment side by side: a table and a figure, from records and nothing else.

    hcms-lab compare fig3                          # every committed hardware, and the newest run here
    hcms-lab compare outputs/fig3/latest paper_tables/records/nvidia-h200/fig3
    hcms-lab compare A B C --out results           # where table and figure go; default outputs/compare

Only cases of one workload, shape, kernel and cut share a row; what cannot be compared is said in a line. Records of
another schema, or of different experiments, are refused with exit status 2.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path


def options(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="run folders, records.jsonl files, or an experiment's name")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"), help="folder for tables and figure")


def run(arguments: Namespace) -> int:
    from hcms_lab.report import style
    from hcms_lab.report.compare import compare, file_name, find, load
    from hcms_lab.report.tables import to_markdown, write_table

    comparison = compare(load(find(arguments.runs)))
    written: list[Path] = []
    for group in comparison.groups:
        print(f"\n{comparison.exp}: {group.title}\n\n{to_markdown(group.table)}")
        name = f"{comparison.exp}_{file_name(group.title)}"
        written += write_table(name, group.table, caption=group.title, folder=arguments.out)
    for note in comparison.notes:
        print(f"note: {note}")
    written += style.save(comparison.figure(), comparison.exp, alt=comparison.alt(), folder=arguments.out)
    for path in written:
        print(f"wrote {os.path.relpath(path)}")
    return 0
