"""A run of the micro-benchmark small enough for tests, made once a session for all that read what it wrote."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

from forks import start_command

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

    A script is run by a fork of `warm.py`, which has imported torch already; `-m` and `-c` start an interpreter.
    """
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **variables}
    if arguments[0].endswith(".py"):
        return _forked(folder, arguments, environment)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def _forked(folder: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = start_command(arguments, folder, out.fileno(), err.fileno(), environment)
        try:
            status = process.wait(LIMIT_S)
        finally:
            process.kill()
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(list(arguments), status, *texts)


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
