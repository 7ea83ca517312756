"""What two to eight GPUs can tell, the most valuable first, on their fast link and on a slow one: `make gpu-four`.

Every step is one experiment of run.py at full size; `slow` steps run with NCCL_P2P_DISABLE=1, through host memory,
which is the paper's regime on the same GPUs. A step that has ended is not run
again, one that was cut off goes on where it was: call again until all are done. Place what came out with

    hcms-lab contribute outputs/gpu-four/fast/fig3/latest
    hcms-lab contribute outputs/gpu-four/slow/fig3/latest --variant p2p-off

    hcms-lab gpu-four [--minutes 9] [--list] [key=value ...]    # settings go to every step
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
from hcms_lab.ground.paths import ROOT, UNFINISHED

LINKS = {"fast": {}, "slow": {"NCCL_P2P_DISABLE": "1"}}
EXPERIMENTS = ("calibrate", "fig3", "fig4", "fig2", "fig5", "fig8", "table2", "table3", "table5", "fig7")
STEPS = [(name, link) for name in EXPERIMENTS for link in LINKS]


def folder_of(name: str, link: str, output: Path) -> Path:
    return output / link / name


def is_done(name: str, link: str, output: Path) -> bool:
    return (folder_of(name, link, output) / "latest").exists()


def resumes(name: str, link: str, output: Path) -> list[str]:
    """What makes a step go on where it was cut off."""
    unfinished = folder_of(name, link, output) / UNFINISHED
    return [f"resume={unfinished}"] if unfinished.is_symlink() else []


def command(name: str, link: str, output: Path, resume: list[str], settings: list[str]) -> list[str]:
    return [sys.executable, "experiments/run.py", f"+exp={name}", f"output={output / link}", *resume, *settings]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for every step")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no step later, cut off the last")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu-four"))
    parser.add_argument("--list", action="store_true", help="show the steps, run nothing")


def run(arguments: Namespace) -> int:
    if arguments.list:
        for name, link in STEPS:
            print(f"{'done' if is_done(name, link, arguments.output) else 'to do':6} {link:5} {name}")
        return 0
    if visible_gpus() < 2:
        raise UsageError(f"{visible_gpus()} GPUs are visible here; this needs 2 at least")
    ends_s, failed = perf_counter() + 60 * arguments.minutes, 0
    for name, link in STEPS:
        if is_done(name, link, arguments.output):
            continue
        if ends_s - perf_counter() < 30:
            print("out of time: call again for the rest")
            break
        print(f"== {name}, {link} link", flush=True)
        try:
            status = 2
            # A step that was cut off under other code or settings is refused with 2, and begins anew.
            for resume in filter(None, (resumes(name, link, arguments.output), ["resume=null"])):
                if status == 2:
                    done = subprocess.run(
                        command(name, link, arguments.output, resume, arguments.settings),
                        cwd=ROOT,
                        env={**os.environ, **LINKS[link]},
                        timeout=ends_s - perf_counter(),
                    )
                    status = done.returncode
            failed += status != 0
        except subprocess.TimeoutExpired:
            print(f"{name}: cut off; call again and it goes on", flush=True)
            break
    return 1 if failed else 0
