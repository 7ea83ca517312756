"""Standard streams as a program may count on them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO, TextIOWrapper

from hcms_lab.ground.errors import STORAGE, storage_line


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
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper) and stream is getattr(sys, f"__{name}__"):  # and not a test's, say
            setattr(sys, name, _lasting(stream))


def _lasting(stream: TextIOWrapper) -> TextIOWrapper:
    stream.flush()
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    errors = "replace" if stream is sys.stdout else "backslashreplace"
    return TextIOWrapper(
        BufferedWriter(raw),
        stream.encoding,
        errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


@contextmanager
def ends_where_nothing_can_be_written() -> Iterator[None]:
    """A disk that is full, standard output's too, ends the program in one line, with status 1."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        with suppress(OSError):  # what can still be printed is, the rest goes nowhere
            sys.stdout.flush()
        _to_nowhere(1)
        print(f"error: {storage_line(error)}", file=sys.stderr)
        sys.exit(1)


def _to_nowhere(fd: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)
