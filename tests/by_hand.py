"""Arithmetic on paper that predictions must meet, and every cut there is: what only tests ask for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

from hcms_lab.report.closed_form import comm_over_attention, speedup_limit


def every_cut(heads: int) -> Iterator[tuple[int, ...]]:
    """All 2^(heads - 1) ways to cut `heads` heads into ordered chunks."""
    for chunks in range(1, heads + 1):
        for marks in combinations(range(1, heads), chunks - 1):
            yield tuple(end - begin for begin, end in pairwise((0, *marks, heads)))


def cut_speedup_bound(ratio: float, cut: tuple[int, ...]) -> float:
    """Two lanes over serial Ulysses: exposed are the first chunk's exchange (3/4 of its traffic) and the last's return.

    `ratio` is rho, the share of communication in serial Ulysses.
    """
    exposed = (3 * cut[0] + cut[-1]) / (4 * sum(cut))
    return min(1 / (1 - ratio + ratio * exposed), speedup_limit(ratio))


def ring_ms(attention_ms: float, comm_ms: float, ranks: int) -> float:
    """Ring Attention on an ideal link where Ulysses communicates for `comm_ms`: P - 1 steps carry P/2 times as much."""
    return attention_ms / ranks + max(attention_ms * (ranks - 1) / ranks, comm_ms * ranks / 2)


def ring_speedup(ratio: float, ranks: int) -> float:
    """Ring Attention over serial Ulysses on an ideal link."""
    comm = comm_over_attention(ratio)
    return (1 + comm) / ring_ms(1.0, comm, ranks)


def wire_ratio(seq_len: int, width: int, ranks: int, *, tflops: float, gbps: float, itemsize: int = 2) -> float:
    """rho from wire time alone, of a layer of batch 1 and `width` elements a token: attention at a steady rate."""
    sent_gb = 4 * (ranks - 1) / ranks**2 * seq_len * width * itemsize / 1e9
    attention_s = 4 * seq_len**2 * width / ranks / (tflops * 1e12)
    return sent_gb / gbps / (sent_gb / gbps + attention_s)
