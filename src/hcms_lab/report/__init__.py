"""Figures, tables, pages and W&B: each reads records and nothing else."""
