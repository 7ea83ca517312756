"""Run every experiment that has a time budget, one after the other, and redraw every figure and table.

    hcms-lab reproduce                            # all: about 50 minutes on 2 idle cores
    hcms-lab reproduce --only fig5,table2         # some of them
    hcms-lab reproduce --draw                     # no measurement: redraw from the newest records
    hcms-lab reproduce bench.iterations=3 ...     # settings go to every experiment

A yaml in conf/exp/ takes part by `about.budget_min`; `about.gpus` keeps it off machines with fewer. What an experiment
prints goes to outputs/reproduce/<name>.log. The exit status is 1 where one failed; the others still run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from time import perf_counter

from hcms.hardware import visible_gpus
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.experiments import Experiment, experiments
from hcms_lab.ground.paths import ROOT

LOGS = ROOT / "outputs" / "reproduce"
LAST = ("fig6", "table1")  # they read what the others have measured
EXECUTE = ("-m", "nbconvert", "--log-level=WARN", "--to", "notebook", "--execute", "--output-dir", "outputs/notebooks")


def steps() -> list[Experiment]:
    """The experiments with a budget, in the order in which they run."""
    found = [experiment for experiment in experiments() if experiment.budget_min is not None]
    return sorted(found, key=lambda step: LAST.index(step.name) + 1 if step.name in LAST else 0)


def logged(command: list[str], log: Path) -> tuple[int, float]:
    """Exit status and seconds of a command, its output in `log`."""
    began_s = perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))}
    with log.open("w") as out:
        status = subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT).returncode
    return status, perf_counter() - began_s


def told(status: int, seconds: float, log: Path) -> str:
    """How it ended: the time, and on failure the log's last line."""
    minutes, rest = divmod(round(seconds), 60)
    time = f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    if status == 0:
        return f"ok, {time}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"FAILED after {time}: {lines[-1].strip() if lines else 'no output'} (see {log.relative_to(ROOT)})"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for every experiment")
    parser.add_argument("--only", default="", help="names of experiments, comma-separated")
    parser.add_argument("--draw", action="store_true", help="measure nothing, redraw")


def run(arguments: Namespace) -> int:
    wanted = steps()
    if arguments.only:
        names = arguments.only.split(",")
        if unknown := sorted(set(names) - {step.name for step in wanted}):
            raise UsageError(f"--only {unknown[0]}: choose of {', '.join(s.name for s in wanted)}")
        wanted = [step for step in wanted if step.name in names]
    failed: list[str] = []
    began_s = perf_counter()
    if not arguments.draw:
        print(f"{len(wanted)} experiments, budget {sum(step.budget_min or 0 for step in wanted):g} min", flush=True)
        for number, step in enumerate(wanted, start=1):
            head = f"[{number}/{len(wanted)}] {step.name:7} budget {step.budget_min:g} min"
            print(f"{head} ... ", end="", flush=True)
            if visible_gpus() < step.gpus:
                print(f"skipped: needs {step.gpus} GPUs, {visible_gpus()} visible", flush=True)
                continue
            command = [sys.executable, "experiments/run.py", f"+exp={step.name}", *arguments.settings]
            log = LOGS / f"{step.name}.log"
            status, seconds = logged(command, log)
            print(told(status, seconds, log), flush=True)
            failed += [step.name] * (status != 0)
    for step in wanted:
        notebook = ROOT / "notebooks" / f"{step.name}.ipynb"
        if notebook.exists():
            log = LOGS / f"{step.name}-notebook.log"
            status, seconds = logged([sys.executable, *EXECUTE, str(notebook)], log)
            if status:
                print(f"drawing {step.name}: {told(status, seconds, log)}", flush=True)
                failed.append(f"{step.name}.ipynb")
    minutes = (perf_counter() - began_s) / 60
    print(f"{minutes:.1f} min; " + (f"failed: {', '.join(failed)}" if failed else "all figures and tables redrawn"))
    return 1 if failed else 0
