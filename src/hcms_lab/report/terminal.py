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
    kept = [(column, None if column.wraps else _width(column)) for column in columns]
    while True:
        # What does not wrap is as wide as its longest cell says: it is measured without its rows, of which some have
        # thousands.
        measured = _table(title, kept, sections, with_rows=any(column.wraps for column, _ in kept), **look)
        dropped = [each for each in kept if each[0].rank is not None]
        if Console(width=1000).measure(measured).minimum <= limit or not dropped:
            return _table(title, kept, sections, with_rows=True, **look)
        kept.remove(min(dropped, key=lambda each: each[0].rank or 0))


def _width(column: Column) -> int:
    from rich.cells import cell_len
    from rich.text import Text

    lines = [line for cell in (column.head, *column.cells) for line in Text.from_markup(cell).plain.splitlines()]
    return max(map(cell_len, lines), default=0)


def _table(
    title: str,
    columns: Sequence[tuple[Column, int | None]],
    sections: Collection[int],
    *,
    with_rows: bool,
    **look: Any,
) -> Table:
    """Columns with their widths, None for those that wrap, as a table."""
    from rich.table import Table

    shown = Table(title=title, pad_edge=False, **look)
    for column, whole in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        shown.add_column(column.head, justify=justify, no_wrap=not column.wraps, min_width=whole)
    rows = zip(*(column.cells for column, _ in columns), strict=True) if with_rows else ()
    for row, cells in enumerate(rows):
        shown.add_row(*cells, end_section=row in sections)
    return shown


def print_whole(shown: Table, limit: int) -> None:
    """Print a table in full: where even its last columns are wider than the terminal, lines wrap there, not cells."""
    Console(width=max(limit, Console(width=1000).measure(shown).minimum), highlight=False).print(shown)
