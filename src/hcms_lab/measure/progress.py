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

from hcms_lab.measure.stop import interrupts_held
from hcms_lab.measure.torchrun import started_ranks


@contextmanager
def progress(total: int, what: str) -> Iterator[tuple[Any, Callable[[], None]]]:
    """A bar of `total` rounds; yields a queue for the first rank's ticks, and a function that shows them.

    Where standard error is no terminal, each new title is a line instead. Under torchrun this process is the first
    rank itself and shows them when it is done: a pipe that nobody reads meanwhile would fill up and block it.
    """
    console = Console(stderr=True)
    with interrupts_held():  # the first such queue starts multiprocessing's tracker, which cleans up after us
        ticks: Any = queue.SimpleQueue() if started_ranks() else mp.get_context("spawn").SimpleQueue()
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
