"""Where the laboratory's checkout lies: `conf/`, `outputs/`, `figures/`, `paper_tables/` and `notebooks/` are in it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
