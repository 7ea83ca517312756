"""A run of the micro-benchmark small enough for tests, made once a session for all that read what it wrote."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from forks import python

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
LIMIT_S = 220  # of a command; a test says by its own limit that it wants less
# Two ranks, four heads, a link without a derived pace: every part of a run, in seconds.
SETTINGS = (
    *("device=cpu", "ranks=2", "link.gbps=1", "link.latency_us=0"),
    *("workload.heads=4", "workload.head_dim=16", "workload.tokens_per_frame=16"),
    *("bench.iterations=4", "bench.warmup=1", "bench.predict=false", "wandb.mode=disabled"),
)

FIG3 = (
    "+exp=fig3",
    *SETTINGS,
    "methods=[ulysses,ulysses-packed,hcms-serial@1-1,hcms,ring,ceiling]",
    "cuts=[1-1,auto]",
)


def command(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python command in `folder`, from where modules may be imported too; no GPU is visible to it.

    It is a fork of `warm.py`, which has imported torch already; what torchrun starts are interpreters of their own.
    """
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **variables}
    return python(arguments, folder, environment, LIMIT_S)


@cache
def run() -> tuple[Path, str]:
    """The folder of a whole run, and what it printed."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    done = command(
        folder,
        str(EXPERIMENTS / "run.py"),
        *(*FIG3, "latent_frames=[3,1]"),
    )
    assert done.returncode == 0, done.stderr
    return (folder / "outputs" / "fig3" / "latest").resolve(), done.stdout
