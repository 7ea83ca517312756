"""The few checks that settings of every kind of experiment go through, each refused in one line. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hcms_lab.ground.errors import UsageError

MOST = 2**31 - 1  # of any whole number here: what lies above is a slip of the finger, and no counter overflows


def as_list(value: Any) -> list[Any]:
    """A setting that may be one thing or a list of it."""
    if value is None:
        return []
    return list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else [value]


def whole(name: str, value: Any, low: int = 1, high: int = MOST) -> int:
    """Refuse what is no whole number from `low` to `high`; what YAML writes as 2.0 or true is none."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < low:
        raise UsageError(f"{name}={value}: give a whole number of at least {low}")
    if value > high:
        raise UsageError(f"{name}={value}: give a whole number of at most {high}")
    return value


def number(name: str, value: Any, low: float, high: float, *, above: bool = False, otherwise: str = "") -> float:
    """Refuse what is no number from `low` to `high`; `above` excludes `low`, `otherwise` says what else would do."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (above and value == low):  # nan is on no side of anything
        wanted = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise UsageError(f"{name}={value}: give a number {wanted}{otherwise}")
    return float(value)


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """Refuse what is not among `known`."""
    if value not in (known := tuple(known)):
        raise UsageError(f"{name}={value}: choose one of {', '.join(known)}")
    return value


def distinct(name: str, values: Sequence[Any], advice: str = "nothing to measure; give at least one") -> None:
    """Refuse an empty list, and one that says a thing twice: it would be measured twice under one name."""
    if not values:
        raise UsageError(f"{name}=[]: {advice}")
    seen: list[Any] = []
    for value in values:
        if value in seen:
            raise UsageError(f"{name}={value}: it is there twice; give each value once")
        seen.append(value)


def plain_name(name: str, value: str, why: str) -> str:
    """Refuse what could not name a file or folder below another: separators, dots in front, nothing at all."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", value):
        raise UsageError(f"{name}={value}: {why}; give letters, digits, _ . and -, a letter or digit first")
    return value


def is_folder(path: str) -> bool:
    """Whether there is such a folder; False for a name that no file system takes."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def readable(name: str, path: str, advice: str, *, at_most_mib: float) -> Path:
    """Refuse what is no readable file of a sensible size; what is in it is for the caller to look at."""
    file = Path(path)
    try:
        found = file.is_file()
        size_mib = file.stat().st_size / 2**20 if found else 0.0
        if found:
            with file.open("rb"):
                pass
    except (OSError, ValueError) as error:  # a name that no file system takes, a file that may not be read
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name}={path}: it cannot be read ({why}); {advice}") from None
    if not found:
        raise UsageError(f"{name}={path}: no such file; {advice}")
    if size_mib > at_most_mib:
        raise UsageError(f"{name}={path}: it has {size_mib:.1f} MiB, and {at_most_mib:g} MiB is the limit; {advice}")
    return file
