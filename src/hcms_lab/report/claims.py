"""The paper's claims, as `paper_tables/claims.csv` holds them: what it says, its figure, the verdict's rule."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hcms_lab.ground.paths import ROOT


@dataclass(frozen=True)
class Claim:
    """A row of `claims.csv`. `low` and `high` are the numbers of its rule."""

    name: str
    statement: str
    paper: str
    condition: str
    source: str
    experiment: str
    low: float
    high: float
    rule: str


@cache
def claims(path: Path = ROOT / "paper_tables" / "claims.csv") -> dict[str, Claim]:
    """The claims by name, in the file's order."""

    def number(text: str) -> float:
        return float(text) if text else float("nan")

    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            Claim(*(number(v) if k in ("low", "high") else v for k, v in row.items()))  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]
    return {claim.name: claim for claim in rows}


def band(name: str) -> tuple[float, float]:
    """The range of gains that the paper reports for a claim, as shares."""
    claim = claims()[name]
    return claim.low, claim.high
