"""What can be said without a simulator: speedups, times and bounds on an ideal link, in closed form.

`ratio` is rho, the share of communication in serial Ulysses: T_comm / (T_comm + T_attention). Nothing here knows
launches, latency or copies, so everything is a limit for measured runs.
"""

from __future__ import annotations


def comm_over_attention(ratio: float) -> float:
    """T_comm / T_attention for a communication ratio.

    Raises:
        ValueError: a ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"a communication ratio lies in [0, 1), got {ratio}")
    return ratio / (1 - ratio)


def speedup_limit(ratio: float) -> float:
    """No method that overlaps the same traffic can be faster than Ulysses by more: all of the shorter part hidden."""
    comm_over_attention(ratio)
    return 1 / max(ratio, 1 - ratio)


def two_lane_speedup(ratio: float, chunks: int) -> float:
    """Upper bound over serial Ulysses of `chunks` equal chunks on two lanes; reached for ratio <= 1/2.

    The first exchange and the last return, T_comm / chunks together, stay exposed.

    Raises:
        ValueError: no chunk, or a ratio outside [0, 1).
    """
    if chunks < 1:
        raise ValueError(f"a pipeline needs at least 1 chunk, got {chunks}")
    return min(1 / (1 - ratio + ratio / chunks), speedup_limit(ratio))


def ring_hides_up_to(ranks: int) -> float:
    """The communication ratio (of Ulysses) up to which an ideal ring hides all of its own traffic.

    Raises:
        ValueError: fewer than 2 ranks.
    """
    if ranks < 2:
        raise ValueError(f"a ring needs at least 2 ranks, got {ranks}")
    comm = 2 * (ranks - 1) / ranks**2
    return comm / (1 + comm)
