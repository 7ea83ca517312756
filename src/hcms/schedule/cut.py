"""How a rank's M heads are cut into chunks: even, tapered or as given; and what may be added to a cut in text.

`"1x2-3-1x2+fill+sms8"` is the cut 1-3-1 whose first chunk's queries and last chunk's rows travel in 2 parts each, with
attention of neighbouring chunks on two lanes, and 8 SMs of a GPU kept for communication.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Cut = tuple[int, ...]


def even(heads: int, chunks: int) -> Cut:
    """Chunks that differ by one head at most; where they must differ, the larger ones are in the middle.

    Only the first exchange and the last return are exposed, so the ends get the smaller chunks; the first end before
    the last, as an exchange carries three tensors and a return one.

    Raises:
        ValueError: fewer heads than chunks, or no chunk.
    """
    if not 1 <= chunks <= heads:
        raise ValueError(f"{chunks} chunks cannot be cut from {heads} heads a rank: choose 1 to {heads} chunks")
    base, larger = divmod(heads, chunks)
    first_larger = (chunks - larger + 1) // 2
    return tuple(base + (first_larger <= c < first_larger + larger) for c in range(chunks))


def tapered(heads: int, chunks: int) -> Cut:
    """One head at either end and the rest spread over the middle chunks, largest in the middle."""
    if chunks < 3 or heads <= chunks:
        return even(heads, chunks)
    return (1, *even(heads - 2, chunks - 2), 1)


def usual_cuts(heads: int, most_chunks: int) -> tuple[Cut, ...]:
    """Even and tapered cuts into 1 to `most_chunks` chunks, each once: what is tried where not every cut can be."""
    most = min(heads, most_chunks)
    return tuple(dict.fromkeys(cut(heads, k) for cut in (even, tapered) for k in range(1, most + 1)))


def format_cut(cut: Cut) -> str:
    """`(1, 3, 1)` as `"1-3-1"`."""
    return "-".join(map(str, cut))


def parse_cut(text: str | int, heads: int) -> Cut:
    """Read a cut of `heads` heads a rank.

    Args:
        text: `"1-3-1"` (as given), `"5"` with `heads == 5` (one chunk), `"even:4"`, `"even:max"` (one head a chunk),
            `"tapered:3"`.
        heads: M, the rank's share of the heads.

    Raises:
        ValueError: not of that form, more chunks than heads, an empty chunk, or a sum other than `heads`.
    """
    text = str(text).strip()
    if text == "even:max":
        return even(heads, heads)
    if match := re.fullmatch(r"(even|tapered):(\d+)", text):
        return (even if match[1] == "even" else tapered)(heads, int(match[2]))
    if not re.fullmatch(r"\d+(-\d+)*", text):
        raise ValueError(f"cut {text!r} is not of the form '1-3-1', 'even:2' or 'tapered:3'")
    cut = tuple(int(part) for part in text.split("-"))
    if len(cut) > heads:
        raise ValueError(f"cut {text!r} has {len(cut)} chunks, but a rank has only {heads} heads")
    if min(cut) < 1:
        raise ValueError(f"cut {text!r} has a chunk without heads")
    if sum(cut) != heads:
        raise ValueError(f"cut {text!r} adds up to {sum(cut)} heads, but a rank has {heads}")
    return cut


class Shape(NamedTuple):
    """A cut with what is done at its ends; see `Plan`."""

    cut: Cut
    ends: tuple[int, int] = (1, 1)
    fill: bool = False
    comm_sms: int = 0

    def __str__(self) -> str:
        parts = [str(m) for m in self.cut]
        first, last = self.ends
        if len(parts) == 1:
            first = last = max(self.ends)
        for at, n in ((0, first), (-1, last if len(parts) > 1 else 1)):
            parts[at] += f"x{n}" if n > 1 else ""
        return "-".join(parts) + ("+fill" if self.fill else "") + (f"+sms{self.comm_sms}" if self.comm_sms else "")


def parse_shape(text: str | int, heads: int) -> Shape:
    """Read a cut and what is added to it: `"1x2-3-1x2"`, `"even:5x4"` (both ends in 4 parts), `"1-3-1+fill+sms8"`.

    Raises:
        ValueError: as `parse_cut`; parts elsewhere than at an end, or fewer than one.
    """
    text = str(text).strip()
    plain, _, sms = text.partition("+sms")
    if plain != text and not re.fullmatch(r"[1-9]\d{0,3}", sms):
        raise ValueError(f"cut {text!r}: +sms takes how many SMs communication keeps, 1 to 9999, last: '1-3-1+sms8'")
    filled = plain.endswith("+fill")
    chunks = plain.removesuffix("+fill").split("-")
    found: list[int] = []
    for place, chunk in enumerate(chunks):
        match = re.fullmatch(r"(\d+|\w+:\w+?)(?:x(\d+))?", chunk)
        if match is None:
            raise ValueError(f"cut {text!r} is not of the form '1-3-1', 'even:2', 'tapered:3' or '1x2-3-1x2+fill'")
        parts = int(match[2] or 1)
        if parts < 1 or (parts > 1 and 0 < place < len(chunks) - 1):
            raise ValueError(f"cut {text!r}: only the first and the last chunk come in parts, in 1 or more")
        chunks[place] = match[1]
        found.append(parts)
    cut = parse_cut("-".join(chunks), heads)
    return Shape(cut, (found[0], found[-1]), filled, int(sms or 0))
