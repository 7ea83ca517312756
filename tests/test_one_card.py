"""What several ranks on one card need around them: refused where it is missing, and gone with the run.

No MPS daemon can run without a GPU: a program of its name stands in for it, which notes what it is told.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hcms_lab.ground.errors import UsageError
from hcms_lab.measure import one_card

pytestmark = pytest.mark.t0

DAEMON = """#!/bin/sh
if [ "$1" = -d ]; then
    [ -n "$REFUSES" ] && { echo "$REFUSES"; exit 1; }
    sleep 100 & echo $! > "$NOTES/pid"
else
    read -r told; echo "$told" > "$NOTES/told"; kill "$(cat "$NOTES/pid")"
fi
"""
HOLDS = """
import time
from hcms_lab.measure.one_card import one_card
with one_card(2) as variables:
    print(variables["CUDA_MPS_PIPE_DIRECTORY"], flush=True)
    time.sleep(100)
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the daemon's stand-in notes what it does; it is found first from now on."""
    daemon = tmp_path / "bin" / "nvidia-cuda-mps-control"
    daemon.parent.mkdir()
    daemon.write_text(DAEMON)
    daemon.chmod(0o755)
    monkeypatch.setenv("PATH", f"{daemon.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.delenv(one_card.NCCL, raising=False)
    monkeypatch.delenv(one_card.SHARE, raising=False)
    return tmp_path


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(what: str, seconds: float, done) -> None:
    ends_s = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < ends_s, what
        time.sleep(0.05)


def test_the_daemon_lives_as_long_as_the_block(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(one_card.NCCL, "/somewhere/libnccl.so.2")
    with one_card.one_card(2) as variables:
        pipes = Path(variables["CUDA_MPS_PIPE_DIRECTORY"])
        assert pipes.is_dir() and Path(variables["CUDA_MPS_LOG_DIRECTORY"]).is_dir()
        assert variables[one_card.SHARE] == "45"
        assert variables["LD_PRELOAD"] == "/somewhere/libnccl.so.2"
        assert running(int((notes / "pid").read_text()))
    assert (notes / "told").read_text().startswith("quit")
    assert not running(int((notes / "pid").read_text()))
    assert not pipes.parent.exists()


def test_the_daemon_goes_with_a_run_that_is_killed(notes: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    pipes = Path(run.stdout.readline().strip())
    assert pipes.is_dir()
    run.send_signal(signal.SIGKILL)
    run.wait()
    until("the daemon was left running", 10, lambda: not running(int((notes / "pid").read_text())))
    until("its folder was left", 10, lambda: not pipes.parent.exists())


def test_a_daemon_that_does_not_start_says_why(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSES", "An instance of this daemon is already running")
    with (
        pytest.raises(UsageError, match="does not start: An instance of this daemon is already running"),
        one_card.one_card(2),
    ):
        pass


def test_without_a_daemon_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r"no nvidia-cuda-mps-control here.*link\.kind=ghost"):
        one_card.check_one_card()


@pytest.mark.parametrize(("version", "refused"), [((2, 28, 9), True), ((2, 29, 3), True), ((2, 30, 0), False)])
def test_an_nccl_that_takes_one_rank_a_card_is_refused(
    notes: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], refused: bool
) -> None:
    monkeypatch.setattr(one_card, "nccl_version", lambda library: version)
    if not refused:
        one_card.check_one_card()
        return
    with pytest.raises(
        UsageError, match=rf"NCCL {'.'.join(map(str, version))} takes one rank a card.*{one_card.NCCL}="
    ):
        one_card.check_one_card()


def test_what_is_no_nccl_gets_one_line(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(one_card.NCCL, "/nowhere/libnccl.so.2")
    with pytest.raises(UsageError, match=r"^HCMS_NCCL=/nowhere/libnccl\.so\.2: .*No such file") as refusal:
        one_card.check_one_card()
    assert "\n" not in str(refusal.value)
