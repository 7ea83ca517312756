"""Figures, tables, pages and W&B: each reads records and nothing else."""

from hcms_lab import needs

needs("pandas", "scipy", "matplotlib", "seaborn", "tabulate", "jinja2")
