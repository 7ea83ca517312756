"""Ranks as processes of this host: started, watched, and all ended when one fails, with the one cause named.

A rank that raises says so over a pipe and ends; one that dies is seen by its exit status; one that is stopped, by its
state. One that hangs is found by the others' timeout in the exchange that it does not join. Whatever happens to one
rank makes the others fail as well, so that all faults of a moment are judged together.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, Literal

import psutil

from hcms_lab.ground.errors import STORAGE, UsageError, storage_line
from hcms_lab.measure.stop import die_with, interrupts_held

POLL_S = 1.0
STOPPED_POLLS = 5  # so many in a row, not seconds: after Ctrl-Z and `fg`, all wake up together
SETTLE_S = 2.0  # what others say within this time after the first fault is judged with it
GRACE_S = 2.0  # from SIGTERM to SIGKILL
_TEXT = 30_000  # characters of a traceback that fit a pipe that nobody reads yet

# What others say when a rank is gone or does not answer, in Gloo's and NCCL's words: an effect, not a cause.
_OTHERS_FAULT = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|Timed out|timed out|timeout|Failed to recv", re.I
)
_LOST = 255  # what is told of a rank whose server has gone
_DUMP = signal.SIGUSR1  # makes a rank write where it is into its log


class RankFailed(RuntimeError):
    """A rank failed; the message names it and its cause."""


# In the order in which they are believed: what comes first explains what comes after.
Kind = Literal["usage", "storage", "raised", "died", "stopped", "left alone"]
_ORDER: tuple[Kind, ...] = ("usage", "storage", "raised", "died", "stopped", "left alone")


@dataclass(frozen=True)
class Fault:
    """What became of a rank. `at_s` is on the host's monotonic clock, which all ranks share."""

    rank: int
    kind: Kind
    text: str
    at_s: float
    number: int = 0  # of a storage fault: its errno

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Fault:
        text, number, kind = traceback.format_exc().strip()[-_TEXT:], 0, "raised"
        if isinstance(error, UsageError):
            kind, text = "usage", str(error)
        elif isinstance(error, OSError) and error.errno in STORAGE:
            kind, number = "storage", error.errno
            text = storage_line(error)
        elif _OTHERS_FAULT.search(str(error)):
            kind = "left alone"
        return cls(rank, kind, text, monotonic(), number)


class _Child:
    """A rank's process and the parent's end of its pipe."""

    def __init__(self, rank: int, process: Any, word: Connection) -> None:
        self.rank, self.process, self._word = rank, process, word
        self._polls_stopped = 0
        self._said: list[Fault | None] = []

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def fault(self) -> Fault | None:
        """What became of a process that has ended, if anything did; or that it has been stopped for some time."""
        if self.running:
            with suppress(psutil.NoSuchProcess):
                stopped = psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
                self._polls_stopped = self._polls_stopped + 1 if stopped else 0
            if self._polls_stopped < STOPPED_POLLS:
                return None
            return Fault(self.rank, "stopped", "", monotonic())
        with suppress(EOFError):
            if not self._said and self._word.poll():
                self._said.append(self._word.recv())
        if self._said:
            return self._said[0]
        code = self.process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Fault(self.rank, "died", how, monotonic())


def watch(
    target: Callable[..., None],
    ranks: int,
    *args: Any,
    folder: Path,
    poll: Callable[[], None],
    timeout_s: float,
    forked_with: Sequence[str],
) -> None:
    """Run `target(rank, *args)` in `ranks` processes, their output in `folder/rank<r>.log`; `poll` about once a second.

    Args:
        timeout_s: as the ranks' process groups have it, for the message.
        forked_with: modules that one server imports, from which ranks are then forked: torch is imported once and not
            by each. None are named where ranks shall start from nothing, as CUDA is used to.

    Raises:
        RankFailed: a rank raised, died, was stopped or did not answer. None is left.
        UsageError, OSError: a rank was given what cannot be, or could not write its files.
    """
    context = _context(forked_with)
    resource_tracker.ensure_running()  # where it starts it lets signals through again, which below are held back
    children: list[_Child] = []
    try:
        with _server_watched():
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_rank, args=(target, rank, str(folder), args, theirs))
                with interrupts_held():
                    try:
                        process.start()
                    except (EOFError, OSError) as error:  # of the server that should have forked it
                        why = str(error) or "its server is gone"
                        raise RankFailed(f"rank {rank} could not be started: {why}") from None
                    children.append(_Child(rank, process, ours))
                theirs.close()
        faults = _until_ended(children, poll)
        silent = [child for child in children if child.running and child.rank not in {f.rank for f in faults}]
        if faults:
            for child in silent:
                os.kill(child.process.pid, _DUMP)
            sleep(0.2 if silent else 0.0)
    finally:
        _end([child.process for child in children])
    if faults:
        raise _verdict(faults, [child.rank for child in silent], folder, timeout_s)


def _context(forked_with: Sequence[str]) -> Any:
    if not forked_with:
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["hcms_lab.measure.tied", *forked_with])
    return context


def _until_ended(children: list[_Child], poll: Callable[[], None]) -> list[Fault]:
    """Wait until all have ended, or until some time after the first fault; returns the faults."""
    faults: dict[int, Fault] = {}
    settled_s: float | None = None
    while running := [child for child in children if child.running]:
        left_s = POLL_S if settled_s is None else settled_s - monotonic()
        if left_s <= 0:
            break
        wait([child.process.sentinel for child in running], timeout=min(POLL_S, left_s))
        _end_a_stopped_server()
        _look(children, faults)
        poll()
        if faults and settled_s is None:
            settled_s = monotonic() + SETTLE_S
    _look(children, faults)
    return list(faults.values())


@contextmanager
def _server_watched() -> Iterator[None]:
    """While ranks are started, which waits for the server's answer, whatever has become of it."""
    done = Event()

    def look() -> None:
        while not done.wait(POLL_S):
            _end_a_stopped_server()

    looking = Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()


_server_polls_stopped = 0


def _end_a_stopped_server() -> None:
    """Ranks are children of the server that forked them: while that is stopped, nobody hears of their end."""
    global _server_polls_stopped
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    try:
        stopped = pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        stopped = False
    _server_polls_stopped = _server_polls_stopped + 1 if stopped else 0
    if pid is not None and _server_polls_stopped >= STOPPED_POLLS:
        os.kill(pid, signal.SIGKILL)  # ranks go with it


def _look(children: list[_Child], faults: dict[int, Fault]) -> None:
    for child in children:
        if child.rank not in faults and (fault := child.fault()) is not None:
            faults[child.rank] = fault


def _verdict(faults: list[Fault], silent: list[int], folder: Path, timeout_s: float) -> Exception:
    """The one cause, as an exception: of what explains most the earliest."""
    cause = min(faults, key=lambda fault: (_ORDER.index(fault.kind), fault.at_s))
    log = folder / f"rank{cause.rank}.log"
    match cause.kind:
        case "usage":
            return UsageError(cause.text)
        case "storage":
            return OSError(cause.number, f"rank {cause.rank} could not write: {cause.text}")
        case "raised":
            return RankFailed(f"rank {cause.rank} failed:\n{cause.text}")
        case "died":
            return RankFailed(f"rank {cause.rank} died ({cause.text}); its log is {log}{_hint(cause.text)}")
        case "stopped":
            return RankFailed(f"rank {cause.rank} was stopped (SIGSTOP) and did not go on; its log is {log}")
    if silent:
        who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
        return RankFailed(
            f"{who} gave no answer within {timeout_s:g} s (bench.timeout_s); "
            f"where it was is at the end of {folder / f'rank{silent[0]}.log'}"
        )
    return RankFailed(f"rank {cause.rank} failed:\n{cause.text}")


def _hint(how: str) -> str:
    if how == f"exit status {_LOST}":
        return "; or the server that ranks are forked from did"
    return "; was memory short? The kernel's log says" if how == "SIGKILL" else ""


def _end(processes: list[Any]) -> None:
    """End what still runs, with all that it started: asked first, then not."""
    left = [process for process in processes if process.is_alive()]
    for process in left:
        process.terminate()
    until_s = monotonic() + GRACE_S
    for process in left:
        process.join(max(0.0, until_s - monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session, which holds what it started
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def _rank(target: Callable[..., None], rank: int, folder: str, args: tuple[Any, ...], word: Connection) -> None:
    """A rank's process: out of reach of the terminal's signals, tied to the run, its output in its log."""
    die_with(os.getppid())  # the run itself, or the server, which dies with the run
    if (run := parent_process()) is None or not run.is_alive():  # it was gone before this was asked for
        os._exit(1)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with open(Path(folder) / f"rank{rank}.log", "a", buffering=1) as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        faulthandler.register(_DUMP, all_threads=True)
        target(rank, *args)
        sys.stdout.flush()
    except BaseException as error:
        word.send(Fault.of(rank, error))
        with suppress(OSError):  # the disk that the log is on may be what is full
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)  # peers may be gone, so no goodbye over the groups
    word.send(None)
