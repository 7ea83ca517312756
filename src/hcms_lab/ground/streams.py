"""Standard streams as a program may count on them."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import BufferedWriter, FileIO, TextIOWrapper


class _Lasting(FileIO):
    """A stream whose reader may go (`| head`): what is printed after that goes nowhere."""

    def write(self, data, /) -> int | None:  # pyright: ignore[reportMissingParameterType, reportIncompatibleMethodOverride]
        try:
            return super().write(data)
        except BrokenPipeError:
            _to_nowhere(self.fileno())
            return len(data)


def make_usable() -> None:
    """What was closed goes nowhere, and a character that the encoding lacks is replaced: neither ends a long run."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            _to_nowhere(fd)  # whatever has taken that number since: nobody is to print into it
            setattr(sys, name, os.fdopen(fd, "w", closefd=False, errors="replace"))
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout.flush()
        raw = _Lasting(sys.stdout.fileno(), "w", closefd=False)
        sys.stdout = TextIOWrapper(
            BufferedWriter(raw),
            sys.stdout.encoding,
            "replace",  # as stderr does by itself
            line_buffering=sys.stdout.line_buffering,
            write_through=sys.stdout.write_through,
        )


def let_go() -> None:
    """After a write has failed: what can still be printed is, the rest goes nowhere."""
    with suppress(OSError):
        sys.stdout.flush()
    _to_nowhere(1)


def _to_nowhere(fd: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)
