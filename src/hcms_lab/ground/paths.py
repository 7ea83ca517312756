"""Where the laboratory's checkout lies (`conf/`, `outputs/`, `figures/`, ... are in it), and paths made of data."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hcms_lab.ground.errors import UsageError

ROOT = Path(__file__).resolve().parents[3]
# Where notebooks write figures/ and paper_tables/: the checkout, unless someone only wants to look.
OUT = Path(os.environ.get("HCMS_OUT", ROOT))
UNFINISHED = "unfinished"  # beside the folders of an experiment's runs: a link to the newest that has not ended

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")  # of an experiment, a machine, a variant


def inside(root: Path, *names: str) -> Path:
    """`root` and names that come from settings or records, each checked to be one plain name.

    Raises:
        UsageError: a name that is none, or a link on the way that leads out of `root`.
    """
    for name in names:
        if not NAME.fullmatch(name):
            raise UsageError(f"{name!r} names no folder: give letters, digits, _ . and -, a letter or digit first")
    path = root.joinpath(*names)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"{os.path.relpath(path)} leads out of {os.path.relpath(root)}: remove the link")
    return path
