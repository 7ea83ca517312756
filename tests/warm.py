"""A Python that has imported what commands import, and becomes one of them for each line that it is told.

An interpreter takes four seconds of a core to import torch, pandas and Matplotlib, as often as a test starts a command.
This one imports them once and forks: the fork has the command's arguments, folder, environment and output, runs the
script as `__main__`, and ends as an interpreter does. In: a line of JSON a command. Out: its process id, then its exit
status.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any

PRELOADED = ("hcms_lab.measure.measure", "hcms_lab.run", "hcms_lab.report.registry", "seaborn", "hydra", "rich.table")


def become(order: dict[str, Any]) -> None:
    """Be the command: from here on this process is its own."""
    for target, path in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), target)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    script, *arguments = order["arguments"]
    sys.argv = [script, *arguments]
    sys.path[:0] = [os.path.dirname(script), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    runpy.run_path(script, run_name="__main__")


def serve() -> dict[str, Any] | None:
    """Fork for every line; what the fork is to become, there, and None in the server when nobody tells it any more."""
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    for name in PRELOADED:
        __import__(name)
    if (order := serve()) is not None:
        become(order)
