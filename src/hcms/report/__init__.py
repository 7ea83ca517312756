"""Figures, tables, pages and W&B: each reads records and nothing else."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]  # the repository: outputs/, figures/ and paper_tables/ lie in it
