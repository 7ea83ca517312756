"""Show in the parent's terminal how far the ranks are."""

from __future__ import annotations

import multiprocessing as mp
import queue
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hcms_lab.measure.torchrun import started_ranks


class Ticks:
    """A pipe into which one process, the first rank, puts titles.

    multiprocessing's own queues have locks for more writers than that: named semaphores, which a kill of all processes
    at once would leave behind.
    """

    def __init__(self) -> None:
        self._reader, self._writer = mp.Pipe(duplex=False)

    def put(self, title: str) -> None:
        self._writer.send(title)

    def empty(self) -> bool:
        return not self._reader.poll()

    def get(self) -> str:
        return self._reader.recv()


@contextmanager
def progress(total: int, what: str) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A bar of `total` rounds; yields what the first rank puts its ticks into, and a function that shows them.

    Where standard error is no terminal, each new title is a line instead. Under torchrun this process is the first
    rank itself and shows them when it is done: a pipe that nobody reads meanwhile would fill up and block it.
    """
    console = Console(stderr=True)
    ticks: Any = queue.SimpleQueue() if started_ranks() else Ticks()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        shown = what

        def show() -> None:
            nonlocal shown
            while not ticks.empty():
                title = ticks.get()
                bar.update(task, advance=1, description=title)
                if title != shown and not sys.stderr.isatty():
                    console.print(f"measuring {title}")
                shown = title

        yield ticks, show
        show()
