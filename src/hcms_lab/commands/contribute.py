"""Check a run and place it among the committed reference runs, so that others can compare with your hardware.

    hcms-lab contribute outputs/fig3/latest                      # check, then copy
    hcms-lab contribute outputs/fig3/latest --check              # check only
    hcms-lab contribute outputs/fig3/latest --variant p2p-off    # beside others, under <hardware>-p2p-off
    hcms-lab contribute outputs/fig3/latest --replace            # instead of an earlier run of this hardware
    hcms-lab contribute outputs/fig3/unfinished --cut-off --variant short    # the points that it has whole

A run passes if it is complete and every case is ok, its code is that of a commit, its environment is there, and
nothing in it tells a secret, a user, a host or an absolute path. Exit status 1 where it does not pass, a line a reason.
A run with fewer rounds or cases than its experiment's own, or than the run that it would replace, is a variant.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from hcms_lab.ground.errors import UsageError


def options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a run's folder, such as outputs/fig3/latest")
    parser.add_argument("--cut-off", action="store_true", help="of a run that was cut off, the points that are whole")
    parser.add_argument("--check", action="store_true", help="check only, copy nothing")
    parser.add_argument("--variant", help="what sets this run apart from others of the same hardware, such as p2p-off")
    parser.add_argument("--replace", action="store_true", help="replace an earlier run of this experiment and hardware")


def run(arguments: Namespace) -> int:
    from hcms_lab.report.contribute import check_variant
    from hcms_lab.report.cut_off import whole_points

    check_variant(arguments.variant)
    if not arguments.folder.is_dir():
        raise UsageError(f"{arguments.folder} is no folder: give a run's, such as outputs/fig3/latest")
    with TemporaryDirectory() as scratch:
        folder = arguments.folder.resolve()
        return placed(whole_points(folder, Path(scratch) / "run") if arguments.cut_off else folder, arguments)


def placed(folder: Path, arguments: Namespace) -> int:
    """Check a run and copy it; the exit status."""
    from hcms_lab.ground.load import records, reduced
    from hcms_lab.report.contribute import place, problems

    found = problems(folder)
    for line in found:
        print(f"not fit to publish: {line}", file=sys.stderr)
    if found:
        return 1
    if arguments.check:
        less = "" if arguments.variant else reduced(folder)
        print(f"fit to publish: {len(records(folder))} records" + (f", with --variant NAME: {less}" if less else ""))
        return 0
    target = place(folder, variant=arguments.variant, replace=arguments.replace)
    print(f"wrote {os.path.relpath(target)}\nnext: make readme, then commit both and open a pull request")
    return 0
