"""Whatever becomes of a rank, of the parent or of the disk: the run ends by itself, says who and why once, exits
with a status that says so, leaves no process and no shared memory, and keeps every record whole.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import tiny
from forks import Command, namespaces
from hcms_lab.ground.records import RecordFile

pytestmark = pytest.mark.t1

FAULTY = str(Path(__file__).with_name("faulty.py"))
TINY = ["+exp=fig3", *tiny.SETTINGS, "latent_frames=[2,1]", "methods=[ulysses,hcms]", "cuts=[even:2]"]
LONG = f"latent_frames=[{','.join(map(str, range(24, 0, -1)))}]"  # many points: longer than any test waits


def processes(folder: Path) -> list[psutil.Process]:
    """Those of a run: all work in the folder that it was started in."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(autouse=True)
def nobody_stays(tmp_path: Path) -> Iterator[None]:
    """Whatever a test finds, it leaves no process of its run."""
    yield
    for process in processes(tmp_path):
        process.kill()


def wait_for_none(folder: Path, within_s: float) -> None:
    """multiprocessing's tracker sees its parent's end a moment later than we do."""
    until_s = time.monotonic() + within_s
    while (left := processes(folder)) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert not left


def faulty(folder: Path, fault: str, *settings: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return tiny.command(folder, FAULTY, *TINY, *settings, FAULT=fault, **variables)


def run_folder(folder: Path) -> Path:
    found, unfinished = sorted((folder / "outputs" / "fig3").iterdir())  # and no `latest`: the newest whole run
    assert (unfinished.name, unfinished.resolve()) == ("unfinished", found)
    return found


def assert_first_point_is_whole(folder: Path) -> None:
    records = RecordFile(folder / "records.jsonl").read()
    assert [(r["frames"], r["method"], r["status"], r["ok"]) for r in records] == [
        (2, "ulysses", "done", True),
        (2, "hcms", "done", True),
    ]


# ---- a rank ----------------------------------------------------------------------------------------------------------

DIED = "rank 1 died (SIGKILL); its log is"
RAISED = "RuntimeError: a made-up fault"
STOPPED = "rank 1 was stopped (SIGSTOP) and did not go on"
CASES = [
    ("start:killed:1", DIED, ()),
    ("start:raises:1", RAISED, ()),
    ("exchange:killed:1", DIED, ()),
    ("exchange:stopped:1", STOPPED, ()),
    ("exchange:raises:2", RAISED, ("ranks=4", "workload.heads=8")),
    ("attention:raises:1", RAISED, ()),
    ("attention:memory:1", "DefaultCPUAllocator: can't allocate memory", ()),
    ("round:spins:1", "rank 1 gave no answer within 4 s (bench.timeout_s)", ("bench.timeout_s=4",)),
    ("records:killed:0", "rank 0 died (SIGKILL); its log is", ()),
]


@pytest.mark.parametrize(("fault", "cause", "settings"), CASES, ids=[case[0] for case in CASES])
def test_a_rank_that_fails_takes_the_run_down(
    tmp_path: Path, fault: str, cause: str, settings: tuple[str, ...]
) -> None:
    done = faulty(tmp_path, fault, *settings)
    ended_s = time.time()
    assert done.returncode == 1, done.stderr
    folder = run_folder(tmp_path)
    allowed_s = 15 + 4 * ("spins" in fault)  # what hangs is found by the timeout that is configured
    assert ended_s - float((folder / "fault").read_text()) < allowed_s
    wait_for_none(tmp_path, 2)

    rank = fault.rsplit(":", 1)[1]
    assert done.stderr.count(cause) == 1, done.stderr
    assert done.stderr.count(f"rank {rank} ") == 1, "the rank is named, once"
    assert done.stderr.count("Traceback (most recent call last)") == int("raises" in fault or "memory" in fault)
    last = f"error: the run failed; its log and its records so far are in outputs/fig3/{folder.name}"
    assert done.stderr.splitlines()[-1] == last
    if "raises" in fault:
        assert "a made-up fault" in (folder / f"rank{rank}.log").read_text()
    if "spins" in fault:
        assert "happen" in (folder / "rank1.log").read_text(), "where it hung is in its log"

    if fault.startswith("start"):
        assert not (folder / "records.jsonl").exists()
    else:
        assert_first_point_is_whole(folder)


def test_a_rank_that_will_not_end_is_ended(tmp_path: Path) -> None:
    """Rank 0 ignores SIGTERM; rank 1 raises beside it."""
    done = faulty(tmp_path, "round:raises:1", STUBBORN="0")
    assert done.returncode == 1
    folder = run_folder(tmp_path)
    assert time.time() - float((folder / "fault").read_text()) < 15
    assert done.stderr.count(RAISED) == 1
    assert "rank 1 failed:" in done.stderr
    wait_for_none(tmp_path, 2)
    for rank in range(2):
        assert not psutil.pid_exists(int((folder / f"pid{rank}").read_text()))
    assert_first_point_is_whole(folder)


# ---- the parent ------------------------------------------------------------------------------------------------------


def started(
    folder: Path, *, ignores: tuple[signal.Signals, ...] = (), beside: int | None = None
) -> tuple[Command, Path]:
    """An endless run in a session of its own, once it has measured its first point."""
    command = [str(tiny.EXPERIMENTS / "run.py"), *TINY, "bench.iterations=80", LONG]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = Command(command, folder, environment, own_session=True, ignores=ignores, beside=beside)
    until_s = time.monotonic() + 60
    while not (found := [f for f in folder.glob("outputs/fig3/2*/records.jsonl") if f.stat().st_size]):
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < until_s
        time.sleep(0.05)
    return run, found[0].parent


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_in_one_line(tmp_path: Path, name: str) -> None:
    """To every process of the terminal's group, as Ctrl-C and a closed terminal send it."""
    run, folder = started(tmp_path)
    for _ in range(3):  # as an impatient hand would, while the first is being obeyed
        os.killpg(run.pid, signal.Signals[name])
        time.sleep(0.15)
    _, err = run.communicate(timeout=15)
    said = [line for line in err.splitlines() if not line.startswith("measuring ")]
    assert said == [f"error: stopped ({name}); the records so far are in outputs/fig3/{folder.name}"]
    assert run.returncode == 128 + signal.Signals[name]
    wait_for_none(tmp_path, 1)
    records = RecordFile(folder / "records.jsonl").read()
    assert records
    assert all(r["ok"] for r in records)


def as_a_terminal_starts_it() -> None:
    """Whatever started the tests may have had these ignored, and what is ignored stays so."""
    for each in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)


def typed(folder: Path) -> subprocess.Popen[str]:
    """A run as a terminal starts it, in a Python of its own: its imports are what is looked at."""
    return subprocess.Popen(
        [sys.executable, str(tiny.EXPERIMENTS / "run.py"), *TINY],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_a_terminal_starts_it,
    )


@pytest.mark.parametrize("wanted", [3, 4, 5])  # the parent, multiprocessing's tracker, the ranks' server, two ranks
def test_an_interrupt_before_anything_runs(tmp_path: Path, wanted: int) -> None:
    """While ranks start: they import for seconds, and say nothing of the interrupt either."""
    run = typed(tmp_path)
    until_s = time.monotonic() + 60
    while len(processes(tmp_path)) < wanted:
        assert run.poll() is None
        assert time.monotonic() < until_s
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=15)
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: stopped (SIGINT)")
    assert run.returncode == 130
    wait_for_none(tmp_path, 1)


def test_ranks_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Started by a script's `&`, which ignores SIGINT; an interrupt changes nothing, and SIGKILL leaves nobody."""
    run, folder = started(tmp_path, ignores=(signal.SIGINT,))
    os.killpg(run.pid, signal.SIGINT)
    time.sleep(1.5)
    assert run.poll() is None
    run.kill()
    run.communicate(timeout=15)
    wait_for_none(tmp_path, 5)
    lines = (folder / "records.jsonl").read_bytes()
    time.sleep(1.5)
    assert (folder / "records.jsonl").read_bytes() == lines, "nobody appends any more"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_server_that_ranks_are_forked_from_takes_the_run_down(tmp_path: Path, how: signal.Signals) -> None:
    """Ranks are its children: nobody else hears of their end."""
    run, _ = started(tmp_path)
    children = [p for p in processes(tmp_path) if p.ppid() == run.pid]
    (server,) = (p for p in children if "multiprocessing.resource_tracker" not in " ".join(p.cmdline()))
    server.send_signal(how)
    _, err = run.communicate(timeout=15)
    assert run.returncode == 1, err
    assert "died (exit status 255); its log is" in err and "the server that ranks are forked from" in err
    assert "Traceback" not in err
    wait_for_none(tmp_path, 5)


def test_a_server_that_is_stopped_before_there_are_ranks(tmp_path: Path) -> None:
    """The run waits for its answer then, and is told no more of a signal than that it came."""
    run = typed(tmp_path)
    until_s, servers = time.monotonic() + 60, []
    while not servers:
        assert run.poll() is None
        assert time.monotonic() < until_s
        servers = [p for p in processes(tmp_path) if "multiprocessing.forkserver" in " ".join(p.cmdline())]
    servers[0].suspend()
    _, err = run.communicate(timeout=20)
    assert run.returncode == 1, err
    assert "could not be started" in err or "the server that ranks are forked from" in err
    assert "Traceback" not in err
    wait_for_none(tmp_path, 5)


LATE = """
import os, signal, sys, time
from hcms_lab.measure.stop import Stopped, stoppable
class Late:
    def __del__(self):  # when modules are taken apart, after Python has given up its handlers
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
late = Late()
try:
    with stoppable():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
except Stopped as stopped:
    sys.exit(stopped.status)
"""


def test_a_signal_at_python_s_very_end_changes_no_status() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], stderr=subprocess.PIPE, preexec_fn=as_a_terminal_starts_it)
    assert (done.returncode, done.stderr) == (130, b"")


# ---- shared memory and disks: a mount of its own where this machine lets us ------------------------------------------


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(tried, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not may_mount(), reason="no leave to mount a file system of one's own (needs root)")


def mounted(folder: Path, mount: str, command: list[str], after: str, **variables: str) -> tuple[int, str, str]:
    """A command where that was mounted, for nobody else: its status, what it said, and what `after` printed then."""
    with namespaces(["unshare", "--mount"], f"cd {folder} && {mount}") as beside:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
        run = Command(command, folder, environment, beside=beside)
        try:
            _, err = run.communicate(100)
        finally:
            run.kill()
        return run.wait(), err, shown(beside, folder, after)


def shown(beside: int, folder: Path, command: str) -> str:
    """What a shell's command prints beside that process."""
    there = ["nsenter", f"--target={beside}", "--mount", "sh", "-c", f"cd {folder}; {command}"]
    return subprocess.run(there, capture_output=True, text=True, check=False).stdout


SHM = "mount -t tmpfs none /dev/shm"


@needs_mount
@pytest.mark.parametrize("fault", ["exchange:killed:1", "round:raises:0"])
def test_no_shared_memory_is_left(tmp_path: Path, fault: str) -> None:
    status, _, left = mounted(tmp_path, SHM, [FAULTY, *TINY], "sleep 0.5; ls -A /dev/shm", FAULT=fault)
    assert status == 1
    assert left == ""
    wait_for_none(tmp_path, 2)


@needs_mount
def test_no_shared_memory_is_left_by_what_is_killed_as_a_whole(tmp_path: Path) -> None:
    """As a job's last signal, or the kernel for want of memory, ends all of its processes at once."""
    with namespaces(["unshare", "--mount"], SHM) as beside:
        run, _ = started(tmp_path, beside=beside)
        os.killpg(run.pid, signal.SIGKILL)
        assert run.wait(15) == -signal.SIGKILL
        assert shown(beside, tmp_path, "sleep 1; ls -A /dev/shm") == ""
    wait_for_none(tmp_path, 5)


@needs_mount
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """What was recorded stays; one line says what happened."""
    (tmp_path / "outputs").mkdir()
    mount, kept = "mount -t tmpfs -o size=4m none outputs", "cat outputs/fig3/2*/records.jsonl"
    status, err, lines = mounted(tmp_path, mount, [FAULTY, *TINY], kept, FAULT="records:filled:0")
    assert status == 1, err
    said = [line for line in err.splitlines() if not line.startswith("measuring ")]
    assert len(said) == 1, err
    assert said[0].startswith("error: rank 0 could not write: ")
    assert "No space left on device; the records so far are in outputs/fig3/" in said[0]
    whole = [json.loads(line) for line in lines.splitlines() if line.endswith("}")]
    assert [r["frames"] for r in whole[:2]] == [2, 2]
    wait_for_none(tmp_path, 2)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The same where nothing can be mounted: a quota's answer."""
    done = faulty(tmp_path, "records:limited:0")
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("measuring ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("error: rank 0 could not write: File too large; the records so far are in outputs/fig3/")
    assert RecordFile(run_folder(tmp_path) / "records.jsonl").read()[1]["frames"] == 2
    wait_for_none(tmp_path, 2)


@needs_mount
@pytest.mark.parametrize(
    ("mount", "why"),
    [
        ("mount -t tmpfs -o size=256k none outputs", "the disk is full"),
        ("mount -t tmpfs -o ro none outputs", "Read-only file system"),
        ("mkdir outputs/fig3 && mount -t tmpfs -o ro none outputs/fig3", "Read-only file system"),
    ],
    ids=["full", "read-only", "read-only below"],
)
def test_nowhere_to_write(tmp_path: Path, mount: str, why: str) -> None:
    (tmp_path / "outputs").mkdir()
    status, err, found = mounted(tmp_path, mount, [str(tiny.EXPERIMENTS / "run.py"), *TINY], "find outputs")
    assert status == 2, err
    assert err.count("\n") == 1
    assert err.startswith("error: output=outputs: no folder to write to (")
    assert why in err
    assert set(found.split()) <= {"outputs", "outputs/fig3"}, "nothing was begun"
