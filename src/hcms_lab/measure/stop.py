"""Signals that end a run: one line and 128 + signal as the exit status, and no process that outlives its parent."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_PATIENCE = 5  # signals after the first


class Stopped(BaseException):
    """The run was asked to end. No Exception, as KeyboardInterrupt is none: what goes on after errors lets it pass."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped ({signal.Signals(signum).name})")
        self.status = 128 + signum


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread: the first of them, the rest are ignored.

    A signal that is ignored already (`nohup`, a script's `&`) stays so. One of torchrun's ranks ends at once instead:
    it may be waiting in a collective, where no handler runs, and torchrun says what happened.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    handler = signal.SIG_DFL if "TORCHELASTIC_RUN_ID" in os.environ else _stop
    before = {s: signal.signal(s, handler) for s in _ENDING if signal.getsignal(s) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for each, earlier in before.items():
            if signal.getsignal(each) is not _nothing:  # else this process is ending, and another must not cut it short
                signal.signal(each, earlier)


# While a step must not be cut in two, the first signal is kept here: another thread may take what this one has blocked.
_held: list[int | None] = []
_ignored: list[int] = []


def _stop(signum: int, frame: object = None) -> None:
    if _held:
        _held[0] = _held[0] or signum
        return
    for each in _ENDING:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _nothing)  # a signal on its way to a handler that is then gone would be a traceback
    raise Stopped(signum)


def _nothing(signum: int, frame: object) -> None:
    """A few that are impatient change nothing; who goes on asking wants no end in good order."""
    _ignored.append(signum)
    if len(_ignored) > _PATIENCE:
        os._exit(128 + signum)


def _deaf_at_the_end() -> None:
    """A process that is ending in good order is not cut short where Python gives up its handlers, which is last."""
    for each in _ENDING:
        if signal.getsignal(each) is _nothing:
            signal.signal(each, signal.SIG_IGN)


atexit.register(_deaf_at_the_end)  # before what is imported later, so that it runs after what that registers


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold back signals that end the run until the end of the block, which a process is started in.

    What a terminal sends to all of its processes, such a process never gets.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    _held.append(None)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if (signum := _held.pop()) is not None:
            _stop(signum)


def die_with(parent: int) -> None:
    """End this process as soon as its parent, of that process id, is gone, however that came about (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before this was asked for
        os._exit(1)
