"""Figures and tables register themselves here; whoever lists them reads this and nothing else.

    @register("fig3", "Latency by sequence length")
    def fig3(records): ...

A file of this folder named `fig*.py` or `table*.py` is found by itself: a new one needs no other list.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, TypeVar

from hcms_lab import report
from hcms_lab.ground import load

Make = TypeVar("Make", bound=Callable[..., Any])

_REGISTERED: dict[str, Exhibit] = {}


@dataclass(frozen=True)
class Exhibit:
    """A figure or a table.

    Args:
        name: that of its experiment, its file, its notebook: `fig3`, `table2`.
        title: what it shows, in a few words.
        make: records to a matplotlib figure, whose `get_label()` says in a sentence what it shows, or to a DataFrame
            with its caption in `attrs["caption"]`.
        reads_all: it reads the records of all experiments by itself and takes none.
        beside: links and transports whose newest committed run has a file of its own where the newest of all is
            over another.
        stills: pictures of the run that are shown beside it, as a pattern inside the run's folder.
    """

    name: str
    title: str
    make: Callable[..., Any]
    reads_all: bool = False
    stills: str | None = None
    beside: tuple[str, ...] = ("native", "native-copy-engine", "native-host", "ghost", "ghost-sm", "emulated")

    @property
    def is_figure(self) -> bool:
        return self.name.startswith("fig")

    @property
    def label(self) -> str:
        """`Figure 3`, `Table 1`."""
        return re.sub(r"^(fig|table)", lambda match: "Figure " if match[1] == "fig" else "Table ", self.name)

    def newest(self) -> Path | None:
        """The folder of the newest run; None for what reads all of them."""
        return None if self.reads_all else load.newest(self.name)

    def of(self, folder: Path | str | None) -> Any:
        """The figure or table of a run's folder. That of a reduced run says so, in its title or caption."""
        if self.reads_all or folder is None:
            return self.make()
        from hcms_lab.report import parts

        shown = self.make(load.records(folder))
        if less := load.reduced(folder):
            if self.is_figure:
                parts.headline(shown, f"reduced run: {less}", shown.get_suptitle())
                shown.set_label(f"{shown.get_label()} A reduced run: {less}.")
            else:
                shown.attrs["caption"] = f"Reduced run: {less}. {shown.attrs['caption']}"
        return shown

    def pictures(self, folder: Path | str) -> list[Path]:
        """Its stills in a run's folder, where that has some."""
        return sorted(Path(folder).glob(self.stills)) if self.stills else []

    def save(self, shown: Any, folder: Path | None = None, *, place: str = "") -> list[Path]:
        """Write its files into `folder`, or to where the paper has them, and return their paths.

        Of a run over another `place` (`load.by_link`) that is one to look at, which says so in its name.
        """
        from hcms_lab.report import style, tables

        where: dict[str, Any] = {} if folder is None else {"folder": folder}
        name = f"{self.name}-{place}" if place else self.name
        if self.is_figure:
            return style.save(shown, name, alt=shown.get_label(), vector=not place, **where)
        return tables.write_table(name, shown, caption=shown.attrs["caption"], to_paste=not place, **where)


def register(name: str, title: str, **settings: Any) -> Callable[[Make], Make]:
    """Decorate what makes a figure or a table of records; `settings` are the further fields of `Exhibit`.

    Raises:
        ValueError: the name begins with neither `fig` nor `table`, or it is another's.
    """
    if not name.startswith(("fig", "table")):
        raise ValueError(f"{name!r} is neither a figure nor a table: begin its name with fig or table")

    def add(make: Make) -> Make:
        taken = _REGISTERED.get(name)
        if taken is not None and taken.make.__module__ != make.__module__:
            raise ValueError(f"{name!r} is registered already, by {taken.make.__module__}")
        _REGISTERED[name] = Exhibit(name, title, make, **settings)
        return make

    return add


def exhibits() -> dict[str, Exhibit]:
    """All of them by name: figures, then tables, each by number."""
    _discover()

    def place(name: str) -> tuple[bool, int, str]:
        number = re.search(r"\d+", name)
        return not name.startswith("fig"), int(number[0]) if number else 0, name

    return {name: _REGISTERED[name] for name in sorted(_REGISTERED, key=place)}


def exhibit(name: str) -> Exhibit:
    """The figure or table of that name.

    Raises:
        KeyError: there is none.
    """
    return exhibits()[name]


@cache
def _discover() -> None:
    for module in iter_modules(report.__path__):
        if module.name.startswith(("fig", "table")):
            import_module(f"{report.__name__}.{module.name}")
