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
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, fd)  # whatever has taken that number since: nobody is to print into it
            setattr(sys, name, os.fdopen(fd, "w", closefd=False, errors="replace"))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # as stderr does by itself


def let_go() -> None:
    """What is still to be printed goes nowhere: its reader has seen enough, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
