"""Print the paper's claims against the newest records; `notebooks/table1.ipynb` writes the table to paper_tables/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hcms_lab.ground.config import BaseConfig

WRITES = False


@dataclass
class Settings(BaseConfig):
    kind: str = "claims"


def validate(cfg: Settings) -> None:
    """Nothing to refuse: a claim without records is a row that says so."""


def run(cfg: Settings, folder: Path | None) -> bool:
    """Print table 1 on the terminal."""
    from hcms_lab.report.claims import table1

    found = table1()
    shown = Table(title="the paper's claims and ours", caption=found.attrs["caption"], show_lines=True)
    for column in found.columns:
        shown.add_column(column, overflow="fold")
    for row in found.itertuples(index=False):
        shown.add_row(*map(str, row))
    console = Console()
    Console(width=max(console.width, 160)).print(shown)
    return True
