"""`hcms-lab`: the one command line for everything that is not an experiment. Experiments are `experiments/run.py`'s."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import NoReturn

from hcms_lab.ground.errors import UsageError, one_line
from hcms_lab.ground.paths import ROOT
from hcms_lab.ground.streams import ends_where_nothing_can_be_written, make_usable

# In the order in which they are listed; each is a module of `commands` (with _ for -), imported only when it is called.
COMMANDS = {
    "claims": "the paper's claims against the committed records, a paragraph each",
    "compare": "runs of one experiment side by side: a table and a figure",
    "reproduce": "every experiment, one after the other, and every figure and table",
    "gpu-one": "what one GPU can tell, in calls of under ten minutes",
    "gpu-four": "what two to eight GPUs can tell, step by step",
    "contribute": "check a run and place it among the committed records",
    "figures": "draw every figure and table of the committed records",
    "readme": "write the results into README.md, or say whether it is stale",
    "page": "build the results page, one HTML file",
    "notebooks": "write the notebooks from their template, or say whether one differs",
    "tiny-model": "write a small random pipeline to try the drop-in on",
    "sync": "upload the W&B runs that were made offline",
    "dashboard": "build the W&B workspace and report",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help says what there is")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status. Bad input is one line and status 2."""
    make_usable()
    try:
        with ends_where_nothing_can_be_written():
            return _run(sys.argv[1:] if argv is None else argv)
    except UsageError as error:
        print(one_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: stopped (SIGINT)", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    listed = "\n".join(f"  {name:11} {line}" for name, line in COMMANDS.items())
    top = _Parser(
        prog="hcms-lab",
        usage="hcms-lab COMMAND [options]",
        description=f"commands:\n{listed}",
        epilog="hcms-lab COMMAND --help says more. Experiments are run by python experiments/run.py +exp=NAME.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    name = top.parse_args(argv[:1]).command
    if not (ROOT / "conf" / "exp").is_dir():
        raise UsageError("hcms-lab works in a checkout of its repository: there, pip install -e '.[lab]'")
    command = import_module(f"hcms_lab.commands.{name.replace('-', '_')}")
    parser = _Parser(
        prog=f"hcms-lab {name}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.options(parser)
    arguments = parser.parse_intermixed_args(argv[1:])  # key=value may stand before and after options
    return command.run(arguments)
