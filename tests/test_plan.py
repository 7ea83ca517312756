"""Cuts of a rank's heads: even, tapered, or as given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcms.schedule.cut import Shape, even, format_cut, parse_cut, parse_shape, tapered

pytestmark = pytest.mark.t0

heads_and_chunks = st.integers(1, 40).flatmap(lambda heads: st.tuples(st.just(heads), st.integers(1, heads)))
cuts = st.lists(st.integers(1, 8), min_size=1, max_size=8).map(tuple)


def rises_then_falls(cut: tuple[int, ...]) -> bool:
    top = cut.index(max(cut))
    return list(cut[: top + 1]) == sorted(cut[: top + 1]) and list(cut[top:]) == sorted(cut[top:], reverse=True)


@given(heads_and_chunks)
def test_even_is_even_and_smallest_at_the_ends(case: tuple[int, int]) -> None:
    heads, chunks = case
    cut = even(heads, chunks)
    assert sum(cut) == heads
    assert len(cut) == chunks
    assert max(cut) - min(cut) <= 1
    assert rises_then_falls(cut)
    if chunks > 2 and heads % chunks <= chunks - 2:
        assert cut[0] == cut[-1] == min(cut)


@given(heads_and_chunks)
def test_tapered_has_single_heads_at_its_ends(case: tuple[int, int]) -> None:
    heads, chunks = case
    cut = tapered(heads, chunks)
    assert sum(cut) == heads
    assert len(cut) == chunks
    assert rises_then_falls(cut)
    if chunks >= 3:
        assert cut[0] == cut[-1] == 1


@pytest.mark.parametrize(
    ("heads", "chunks", "expected"),
    [
        (5, 1, (5,)),
        (6, 2, (3, 3)),
        (5, 3, (1, 3, 1)),
        (10, 4, (1, 4, 4, 1)),
        (10, 5, (1, 2, 3, 3, 1)),
        (3, 3, (1, 1, 1)),
    ],
)
def test_tapered_values(heads: int, chunks: int, expected: tuple[int, ...]) -> None:
    assert tapered(heads, chunks) == expected


@pytest.mark.parametrize("builder", [even, tapered])
@pytest.mark.parametrize(("heads", "chunks"), [(5, 6), (5, 0), (5, -1), (1, 2)])
def test_impossible_chunk_counts_are_refused(builder, heads: int, chunks: int) -> None:
    with pytest.raises(ValueError, match=rf"{chunks} chunks .* {heads} heads"):
        builder(heads, chunks)


@given(cuts)
def test_parse_reads_what_format_writes(cut: tuple[int, ...]) -> None:
    assert parse_cut(format_cut(cut), sum(cut)) == cut


@pytest.mark.parametrize(
    ("text", "heads", "expected"),
    [
        ("1-3-1", 5, (1, 3, 1)),
        (" 1-3-1 ", 5, (1, 3, 1)),
        ("5", 5, (5,)),
        (5, 5, (5,)),  # YAML reads an unquoted 5 as a number
        ("even:1", 5, (5,)),
        ("even:2", 10, (5, 5)),
        ("even:4", 10, (2, 3, 3, 2)),
        ("tapered:3", 10, (1, 8, 1)),
    ],
)
def test_parse_values(text: str | int, heads: int, expected: tuple[int, ...]) -> None:
    assert parse_cut(text, heads) == expected


@pytest.mark.parametrize(
    ("text", "heads", "message"),
    [
        ("", 5, "not of the form"),
        ("auto", 5, "not of the form"),
        ("1--3", 5, "not of the form"),
        ("-5", 5, "not of the form"),
        ("1,3,1", 5, "not of the form"),
        ("1-3-", 5, "not of the form"),
        ("2.5-2.5", 5, "not of the form"),
        ("even", 5, "not of the form"),
        ("even:-2", 5, "not of the form"),
        ("odd:2", 5, "not of the form"),
        ("even:0", 5, "0 chunks .* 5 heads"),
        ("even:6", 5, "6 chunks .* 5 heads"),
        ("tapered:6", 5, "6 chunks .* 5 heads"),
        ("1-1-1-1-1-1", 5, "6 chunks, .* only 5 heads"),
        ("5-0", 5, "chunk without heads"),
        ("0", 5, "chunk without heads"),
        ("1-3-2", 5, "adds up to 6 heads, .* has 5"),
        ("4", 5, "adds up to 4 heads, .* has 5"),
    ],
)
def test_parse_says_what_is_wrong(text: str, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cut(text, heads)


@pytest.mark.parametrize("text", ["1x2-3-1x2+fill+sms8", "5+sms16", "1-3-1+sms8", "1-3-1+fill", "5x3", "1-3-1"])
def test_what_is_added_to_a_cut_reads_back(text: str) -> None:
    shape = parse_shape(text, 5)
    assert str(shape) == text
    assert parse_shape(str(shape), 5) == shape


def test_sms_for_communication_stand_last() -> None:
    assert parse_shape("tapered:3+fill+sms8", 5) == Shape((1, 3, 1), fill=True, comm_sms=8)
    for wrong in ("1-3-1+sms", "1-3-1+sms0", "1-3-1+sms-8", "1-3-1+sms8+fill", "1-3-1+sms8.5"):
        with pytest.raises(ValueError, match="how many SMs communication keeps"):
            parse_shape(wrong, 5)
