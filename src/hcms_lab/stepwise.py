"""Experiments one after the other, in calls of a limited time: what was cut off goes on, what has ended stays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from hcms_lab.ground.paths import ROOT, UNFINISHED

_TOO_LATE_S = 30  # before the end no step is begun


@dataclass(frozen=True)
class Step:
    """An experiment of run.py, over a link that its settings make; `link` names its runs' folder."""

    name: str
    link: str
    settings: tuple[str, ...] = ()

    def folder(self, output: Path) -> Path:
        return output / self.link / self.name

    def done(self, output: Path) -> bool:
        return (self.folder(output) / "latest").exists()

    def resumes(self, output: Path) -> list[str]:
        """What makes a step go on where it was cut off."""
        unfinished = self.folder(output) / UNFINISHED
        return [f"resume={unfinished}"] if unfinished.is_symlink() else []

    def command(self, output: Path, resume: Sequence[str], settings: Sequence[str]) -> list[str]:
        where = f"output={output / self.link}"
        return [sys.executable, "experiments/run.py", f"+exp={self.name}", where, *self.settings, *resume, *settings]


def listed(steps: Sequence[Step], output: Path) -> str:
    return "\n".join(f"{'done' if step.done(output) else 'to do':6} {step.link:8} {step.name}" for step in steps)


def run_steps(steps: Sequence[Step], output: Path, ends_s: float, settings: Sequence[str]) -> int:
    """Run what is still to do until `ends_s` on `perf_counter`'s clock; returns how many failed."""
    failed = 0
    for step in steps:
        if step.done(output):
            continue
        if ends_s - perf_counter() < _TOO_LATE_S:
            print("out of time: call again for the rest")
            break
        print(f"== {step.name}, {step.link} link", flush=True)
        try:
            status = 2
            # A step that was cut off under other code or settings is refused with 2, and begins anew.
            for resume in filter(None, (step.resumes(output), ["resume=null"])):
                if status == 2:
                    done = subprocess.run(
                        step.command(output, resume, settings),
                        cwd=ROOT,
                        timeout=ends_s - perf_counter(),
                    )
                    status = done.returncode
            failed += status != 0
        except subprocess.TimeoutExpired:
            print(f"{step.name}: cut off; call again and it goes on", flush=True)
            break
    return failed
