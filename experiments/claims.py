"""Print the paper's claims against the newest records; `notebooks/table1.ipynb` writes the table to paper_tables/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from hcms_lab.ground.config import BaseConfig

WRITES = False


@dataclass
class Settings(BaseConfig):
    kind: str = "claims"


def validate(cfg: Settings) -> None:
    """Nothing to refuse: a claim without records is a row that says so."""


def run(cfg: Settings, folder: Path | None) -> bool:
    """Print a row a claim with its best evidence; all of it stands in paper_tables/table1.md."""
    from hcms_lab.report.table1 import CAPTION, short
    from hcms_lab.report.terminal import Column, table, width

    shown = short()
    columns = [Column(str(name), shown[name].tolist(), wraps=True) for name in shown.columns]
    console = Console(width=width(), highlight=False)
    console.print(table("the paper's claims and ours", columns, width(), show_lines=True))
    console.print(CAPTION, style="dim")
    return True
