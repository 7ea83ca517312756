"""Cuts as records hold them: `1-3-1`, `auto:1-3-1` where it was chosen, `1x2-3-1x2+fill` with its ends in parts."""

from __future__ import annotations

import re

from hcms.schedule.cut import Cut, Shape, parse_shape

AUTO = "auto"


def recorded_shape(cut: str) -> Shape:
    """A record's cut with what is done at its ends."""
    text = cut.removeprefix(f"{AUTO}:")
    return parse_shape(text, sum(map(int, re.findall(r"(?:^|-)(\d+)", text))))


def recorded_cut(cut: str) -> Cut:
    """The heads of each chunk of a record's cut."""
    return recorded_shape(cut).cut


def chunks(cut: str | None) -> int:
    """Into how many chunks a record's cut cuts; 1 where nothing is cut."""
    return len(recorded_cut(cut)) if isinstance(cut, str) and cut else 1
