"""Upload the W&B runs that were made offline, each once.

    hcms-lab sync              # everything under outputs/ that W&B does not have yet
    hcms-lab sync --dry-run    # say what would be uploaded; needs neither key nor network
    hcms-lab sync outputs/fig3

What was uploaded is remembered by a marker that `wandb sync` leaves beside each run. Of a run that was resumed, only
the newest mirror is uploaded: it holds all records. Exit status 1 where an upload failed, 2 where none could start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from hcms_lab.ground.errors import UsageError

TIMEOUT_S = 900


def waiting(root: Path) -> list[Path]:
    """W&B run directories under `root` that are not uploaded: the newest of each run's folder."""
    from hcms_lab.report.wandb_mirror import PENDING

    found = []
    for folder in sorted(path for path in root.rglob("wandb") if path.is_dir() and not path.parent.is_symlink()):
        runs = [*folder.glob("offline-run-*"), *(folder.glob("run-*") if (folder / PENDING).exists() else [])]
        runs = sorted((run for run in runs if run.is_dir()), key=lambda run: run.name.removeprefix("offline-"))
        if runs and not any(runs[-1].glob("*.wandb.synced")):
            found.append(runs[-1])
    return found


def upload(run: Path) -> str | None:
    """Upload one run; returns None, or in one line why it failed."""
    from hcms_lab.report.wandb_mirror import PENDING

    command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(run)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        return f"gave up after {TIMEOUT_S} s"
    # The status is 0 even where the server refused; the marker is written only after everything has arrived.
    if any(run.glob("*.wandb.synced")):
        (run.parent / PENDING).unlink(missing_ok=True)
        return None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return next(
        (line for line in lines if "ERROR" in line or "Error" in line), lines[-1] if lines else "no reason given"
    )


def options(parser: ArgumentParser) -> None:
    parser.add_argument("root", nargs="?", type=Path, default=Path("outputs"), help="where to look; default outputs")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be uploaded")


def run(arguments: Namespace) -> int:
    runs = waiting(arguments.root)
    if not runs:
        print(f"nothing to upload under {arguments.root}")
        return 0
    if arguments.dry_run:
        for waits in runs:
            print(f"would upload {os.path.relpath(waits)}")
        return 0

    import wandb

    from hcms_lab.report.wandb_mirror import reach

    wandb.setup(wandb.Settings(silent=True))
    try:
        if not wandb.login(prompt=False, verify=False):
            raise OSError("no key: run `wandb login` or set WANDB_API_KEY")
        reach(wandb.setup().settings.base_url)
    except Exception as error:
        raise UsageError(f"W&B cannot be reached ({error}); {len(runs)} runs wait under {arguments.root}") from None
    failed = 0
    for waits in runs:
        reason = upload(waits)
        failed += reason is not None
        print(f"uploaded {os.path.relpath(waits)}" if reason is None else f"failed {os.path.relpath(waits)}: {reason}")
    return 1 if failed else 0
