"""What a long run notes of each rank, and how it is written and read."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SoakSample:
    """A rank after a cycle over all points. `wrong` counts outputs so far."""

    minute: float
    cycle: int
    rank: int
    rss_mib: float
    gpu_mib: float
    open_files: int
    threads: int
    wrong: int


def append(path: Path, samples: Sequence[SoakSample]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(SoakSample)])
        if new:
            writer.writeheader()
        writer.writerows(asdict(sample) for sample in samples)


def read(path: Path) -> list[SoakSample]:
    with path.open(newline="") as file:
        kinds: dict[str, Any] = {f.name: int if f.type == "int" else float for f in fields(SoakSample)}
        return [SoakSample(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in csv.DictReader(file)]
