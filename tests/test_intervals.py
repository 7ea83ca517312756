"""Intervals cover what they claim: drawn from known distributions, the truth lies inside as often as they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hcms_lab.report.stats import LEVEL, Interval, ratio_of_medians

pytestmark = pytest.mark.t0

DRAWS = 300
TRUE_RATIO = 1.2
Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(random: np.random.Generator, n: int) -> np.ndarray:
    return 1 + 0.05 * random.standard_normal(n)


def lognormal(random: np.random.Generator, n: int) -> np.ndarray:
    """A long tail, as other work on the machine makes one."""
    return np.exp(0.1 * random.standard_normal(n))


def two_levels(random: np.random.Generator, n: int) -> np.ndarray:
    """Two clocks, or a neighbour that comes and goes: seven in ten at one time, the rest a third slower."""
    return np.where(random.random(n) < 0.7, 1.0, 1.3) * np.exp(0.02 * random.standard_normal(n))


def coverage(draw: Draw, n: int, drift: float, interval: Callable[..., Interval] = ratio_of_medians) -> float:
    """The share of draws whose interval holds the true ratio; `drift` is what both of a round have in common."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(DRAWS):
        rounds = np.exp(drift * random.standard_normal(n))
        found = interval(TRUE_RATIO * draw(random, n) * rounds, draw(random, n) * rounds)
        held += found.low <= TRUE_RATIO <= found.high
    return held / DRAWS


# Of 300 draws at 95 %, two standard errors are 2.5 %. Where rounds drift together, the bootstrap of a median is wide.
LOWEST, HIGHEST = LEVEL - 0.05, 0.995


@pytest.mark.parametrize("n", [8, 20])
@pytest.mark.parametrize(
    ("draw", "drift"),
    [(normal, 0.0), (lognormal, 0.0), (two_levels, 0.0), (normal, 0.1)],
    ids=["normal", "lognormal", "two-levels", "drifting"],
)
def test_intervals_cover_what_they_claim(draw: Draw, drift: float, n: int) -> None:
    assert LOWEST <= coverage(draw, n, drift) <= HIGHEST


@pytest.mark.parametrize("scale", [0.25, 0.5, 2.5])
def test_narrower_and_wider_ones_would_be_found(scale: float) -> None:
    def scaled(base_ms: np.ndarray, ours_ms: np.ndarray) -> Interval:
        found = ratio_of_medians(base_ms, ours_ms)
        low, high = (found.value + scale * (end - found.value) for end in (found.low, found.high))
        return found._replace(low=low, high=high)

    assert not LOWEST <= coverage(lognormal, 20, 0.0, scaled) <= HIGHEST
