"""Let go of process groups before the interpreter ends.

A group's own threads may still drop tensors that Python shares when a process ends right after a call. Once the
interpreter is ending, a thread that asks for its lock is taken down, which C++ answers by aborting the process, results
written or not. A group that is destroyed before has joined its threads; one that an object still holds has not.
"""

from __future__ import annotations

import atexit
from weakref import WeakSet

_holders: WeakSet[object] = WeakSet()


def let_go_at_exit(holder: object) -> None:
    """Have `holder`, which keeps a process group, drop all that it holds when the process ends."""
    _holders.add(holder)


@atexit.register
def _let_go() -> None:
    for holder in list(_holders):
        vars(holder).clear()
