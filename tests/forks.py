"""Processes that the session's warm Python becomes (warm.py): commands and ranks without the wait for their imports.

conftest.py names the socket and starts nothing else: the warm Python is started by the first who asks, for all workers.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import Any

import warm

PLACE = "HCMS_TEST_WARM"  # in the environment: the folder of the socket
_STARTS_S = 100.0


class Fork:
    """A process that is a fork of the warm Python, with the part of `Popen` that tests use."""

    def __init__(
        self,
        order: Mapping[str, Any],
        files: Sequence[int],
        *,
        folder: Path | str,
        environment: Mapping[str, str],
    ) -> None:
        self._word = _connected()
        told = {"folder": str(folder), "environment": dict(environment), "as": list(range(len(files)))}
        warm.send(self._word, {**told, **order}, list(files))
        self._said = b""
        self.returncode: int | None = None
        pid = self._number(None)
        assert pid is not None
        self.pid = pid

    def _number(self, timeout_s: float | None) -> int | None:
        """The next that is said, if it is within that time."""
        self._word.settimeout(timeout_s)
        while b"\n" not in self._said:
            try:
                text = self._word.recv(100)
            except (TimeoutError, BlockingIOError):
                return None
            if not text:
                raise RuntimeError("the warm Python that tests fork from has gone")
            self._said += text
        line, _, self._said = self._said.partition(b"\n")
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status; `TimeoutError` where it runs longer than that."""
        if self.returncode is None:
            self.returncode = self._number(timeout)
            if self.returncode is None:
                raise TimeoutError(f"a fork of the warm Python goes on after {timeout:g} s")
            self._word.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(TimeoutError):
            self.wait(0.0)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Command(Fork):
    """A script, `-m` or `-c` with its arguments, as Python is given them; its output is kept for `communicate`.

    In a session of its own it has a terminal's signals, but for those that it `ignores`. `beside` a process it has the
    mounts and the network that are that one's own.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        own_session: bool = False,
        ignores: Sequence[int] = (),
        beside: int | None = None,
    ) -> None:
        self._out, self._err = TemporaryFile("w+"), TemporaryFile("w+")  # noqa: SIM115
        order = {"arguments": list(arguments), "own_session": own_session, "ignores": [int(each) for each in ignores]}
        order |= {} if beside is None else {"beside": beside}
        with open(os.devnull, "rb") as nothing:
            files = [nothing.fileno(), self._out.fileno(), self._err.fileno()]
            super().__init__(order, files, folder=folder, environment=environment)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, once it has ended."""
        self.wait(timeout)
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return texts[0], texts[1]


@contextmanager
def namespaces(command: Sequence[str], script: str) -> Iterator[int]:
    """A process that only waits, for others to run `beside`: begun by that command, which gives it namespaces of its
    own, and set up there by that script.
    """
    waits = subprocess.Popen(
        [*command, "sh", "-c", f"{script} && echo ready && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert waits.stdin is not None and waits.stdout is not None
    try:
        assert waits.stdout.readline() == "ready\n", script
        yield waits.pid
    finally:
        waits.stdin.close()
        waits.wait()
        waits.stdout.close()


def python(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout_s: float = 100.0
) -> subprocess.CompletedProcess[str]:
    """What `python` with these arguments does in `folder`, to its end."""
    process = Command(arguments, folder, environment)
    try:
        out, err = process.communicate(timeout_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess(list(arguments), process.wait(), out, err)


def _connected() -> socket.socket:
    """To the session's warm Python, which is started where it does not run yet."""
    place = Path(os.environ[PLACE])
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _answering(place) or _started(place)


def _answering(place: Path) -> socket.socket | None:
    """To a warm Python that listens already, or None."""
    word = socket.socket(socket.AF_UNIX)
    try:
        word.connect(str(place / "socket"))
        return word
    except OSError:
        word.close()
        return None


def _started(place: Path) -> socket.socket:
    """Whoever holds the other end of its standard input keeps it alive: the session, which made that pipe."""
    (place / "socket").unlink(missing_ok=True)
    with (place / "log").open("ab") as log, (place / "alive").open("rb") as alive:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py")), str(place / "socket")],
            stdin=alive,
            stdout=log,
            stderr=log,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # an interrupt of the tests is theirs
        )
    until_s = time.monotonic() + _STARTS_S
    while time.monotonic() < until_s and server.poll() is None:
        if (word := _answering(place)) is not None:
            return word
        time.sleep(0.1)
    raise RuntimeError(f"the warm Python does not start: {(place / 'log').read_text()[-2000:]}")


def open_place() -> tuple[Path, int]:
    """A folder for the socket, and what keeps a warm Python alive until it is closed: a pipe's end for writing."""
    place = Path(mkdtemp(prefix="warm-"))
    os.mkfifo(place / "alive")
    held = os.open(place / "alive", os.O_RDWR)
    os.environ[PLACE] = str(place)
    return place, held
