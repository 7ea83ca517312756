"""What ranks must have alike is an error on all of them where it differs, and nobody is left waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from hcms.agree import agree, given_by_first
from ranks import Place, on_ranks

pytestmark = pytest.mark.t1

SHAPES = {"alike": [(1, 8, 4, 16)] * 3, "one differs": [(1, 8, 4, 16), (1, 8, 4, 16), (1, 9, 4, 16)]}


def what_agree_says(place: Place, values: list[tuple[int, ...]], backend: str) -> str | None:
    try:
        agree(getattr(place, backend), values[place.rank], "shape")
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("backend", ["gloo", "emulated"])
def test_all_ranks_hear_who_differs(backend: str) -> None:
    assert on_ranks(3, what_agree_says, SHAPES["alike"], backend) == [None] * 3
    said = on_ranks(3, what_agree_says, SHAPES["one differs"], backend)
    assert said == ["ranks differ in shape: (1, 8, 4, 16) on ranks 0, 1; (1, 9, 4, 16) on rank 2"] * 3


def what_first_gives(place: Place, path: str) -> tuple[str, str]:
    def read() -> str:
        assert place.first, "nobody else reads"
        return Path(path).read_text()

    try:
        return "given", given_by_first(place.emulated, read)
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error)


def test_the_first_rank_reads_for_all(tmp_path: Path) -> None:
    file = tmp_path / "profile"
    file.write_text("schema: 1")
    assert on_ranks(3, what_first_gives, str(file)) == [("given", "schema: 1")] * 3
    file.unlink()
    first, *others = on_ranks(3, what_first_gives, str(file))
    assert first[0] == "FileNotFoundError"
    assert others == [("ValueError", first[1])] * 2
