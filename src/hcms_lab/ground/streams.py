"""Standard streams as a program may count on them."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def make_usable() -> None:
    """What was closed goes nowhere, and a character that the encoding lacks is replaced: neither ends a long run."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(fd, "w", closefd=False))
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
