"""Wan2.2 and other diffusers models: sizes, pipelines, and the two lines that make one sequence-parallel.

Importing this package imports no torch; `config.py` and `sizes.py` stay pure Python.
"""
