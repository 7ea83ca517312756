"""Tables that fit the terminal: columns are dropped in a chosen order until they do, and no cell is ever cut."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table

PIPE = 100  # characters, where the output is no terminal


@dataclass(frozen=True)
class Column:
    """A column of text.

    Args:
        head: its title; a newline breaks it.
        cells: a cell a row.
        right: numbers go to the right.
        wraps: it may break between words; what is a number or a name may not.
        rank: when it is dropped, the lowest first; None is never.
    """

    head: str
    cells: Sequence[str]
    right: bool = False
    wraps: bool = False
    rank: int | None = None


def width() -> int:
    """The terminal's width in characters."""
    return Console().width if sys.stdout.isatty() else PIPE


def table(title: str, columns: Sequence[Column], limit: int, sections: Collection[int] = (), **look: Any) -> Table:
    """A table of at most `limit` characters a line, or of the columns that are never dropped.

    Args:
        sections: rows after which a line is drawn.
        look: further settings of `rich.table.Table`.
    """
    kept = list(columns)
    while True:
        shown = _table(title, kept, sections, **look)
        dropped = [column for column in kept if column.rank is not None]
        if Console(width=1000).measure(shown).minimum <= limit or not dropped:
            return shown
        kept.remove(min(dropped, key=lambda column: column.rank or 0))


def _table(title: str, columns: Sequence[Column], sections: Collection[int], **look: Any) -> Table:
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, pad_edge=False, **look)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        lines = [line for cell in (column.head, *column.cells) for line in Text.from_markup(cell).plain.splitlines()]
        whole = None if column.wraps else max(map(cell_len, lines), default=0)
        shown.add_column(column.head, justify=justify, no_wrap=not column.wraps, min_width=whole)
    for row, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        shown.add_row(*cells, end_section=row in sections)
    return shown


def print_whole(shown: Table, limit: int) -> None:
    """Print a table in full: where even its last columns are wider than the terminal, lines wrap there, not cells."""
    Console(width=max(limit, Console(width=1000).measure(shown).minimum), highlight=False).print(shown)
