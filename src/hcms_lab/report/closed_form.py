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


def cut_speedup_bound(ratio: float, cut: tuple[int, ...]) -> float:
    """The same bound for any cut: exposed are the first chunk's exchange (3/4 of its traffic) and the last's return."""
    exposed = (3 * cut[0] + cut[-1]) / (4 * sum(cut))
    return min(1 / (1 - ratio + ratio * exposed), speedup_limit(ratio))


def ring_ms(attention_ms: float, comm_ms: float, ranks: int) -> float:
    """Ring Attention on an ideal link.

    Args:
        attention_ms: a rank's attention, all of it.
        comm_ms: what Ulysses communicates, on the same link; a ring's P - 1 steps carry P/2 times as much.
        ranks: P.
    """
    if ranks == 1:
        return attention_ms
    return attention_ms / ranks + max(attention_ms * (ranks - 1) / ranks, comm_ms * ranks / 2)


def ring_speedup(ratio: float, ranks: int) -> float:
    """Ring Attention over serial Ulysses on an ideal link."""
    comm = comm_over_attention(ratio)
    return (1 + comm) / ring_ms(1.0, comm, ranks)


def ring_hides_up_to(ranks: int) -> float:
    """The communication ratio (of Ulysses) up to which an ideal ring hides all of its own traffic.

    Raises:
        ValueError: fewer than 2 ranks.
    """
    if ranks < 2:
        raise ValueError(f"a ring needs at least 2 ranks, got {ranks}")
    comm = 2 * (ranks - 1) / ranks**2
    return comm / (1 + comm)


def ulysses_gb(seq_len: int, width: int, ranks: int, itemsize: int) -> float:
    """10^9 bytes that a rank sends in one Ulysses layer of batch 1: four tensors, (P - 1)/P of each rank's share."""
    return 4 * (ranks - 1) / ranks**2 * seq_len * width * itemsize / 1e9


def wire_ratio(seq_len: int, width: int, ranks: int, *, tflops: float, gbps: float, itemsize: int = 2) -> float:
    """rho from wire time alone, of a layer of batch 1: no latency, no copies, no launches, attention at a steady rate.

    Args:
        seq_len: S, the whole sequence.
        width: all heads times head size.
        ranks: P.
        tflops: attention's rate on one GPU, 10^12 floating-point operations a second.
        gbps: 10^9 off-rank bytes a second leaving a rank.
        itemsize: bytes an element.
    """
    comm_s = ulysses_gb(seq_len, width, ranks, itemsize) / gbps
    attention_s = 4 * seq_len**2 * width / ranks / (tflops * 1e12)
    return comm_s / (comm_s + attention_s)
