"""One command a file: its `__doc__` is its help, `options` its arguments, `run` its work. `cli.py` lists them."""
