"""Attention at the clock that its load leaves it: by size, between a call by itself and calls without a pause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hcms.methods import build_schedule
from hcms.schedule.cost import COOL_DUTY, Workload, WorkloadCosts, predict
from hcms.schedule.fit import fit
from hcms.schedule.profile import AttendPoint, Profile, load

pytestmark = pytest.mark.t0

SEQ_LEN, HEADS = 1024, 4
ALONE_MS, HOT_MS = {1: 10.0, 2: 20.0, 4: 44.0}, {1: 12.0, 2: 24.0, 4: 43.0}


def fitted(*more: dict[str, Any], link_ms: float = 0.0, sustained: bool = True) -> Profile:
    """A GPU whose short calls run at a higher clock than its long ones, by themselves."""
    samples: list[dict[str, Any]] = [
        {"op": "attend", "seq_len": SEQ_LEN, "heads": m, "ms": ms} for m, ms in ALONE_MS.items()
    ]
    if sustained:
        samples += [{"op": "sustained", "seq_len": SEQ_LEN, "heads": m, "ms": ms} for m, ms in HOT_MS.items()]
    exchanges = [{"op": "exchange", "bytes_off_rank": b, "ms": link_ms + b / 1e9} for b in (10**6, 10**8)]
    what: dict[str, Any] = {
        "hardware": "gpu-x", "device": "cuda", "world_size": 2, "backend": "nccl", "link": "native", "kernel": "sdpa",
        "dtype": "bfloat16", "head_dim": 128,
    }  # fmt: skip
    return fit([*samples, *exchanges, *more], **what)


def test_each_size_has_its_own_clock_under_load_and_none_is_faster_for_it() -> None:
    profile = fitted()
    assert profile.attend == (
        AttendPoint(SEQ_LEN, 1, 10.0, 12.0), AttendPoint(SEQ_LEN, 2, 20.0, 24.0), AttendPoint(SEQ_LEN, 4, 44.0, 44.0)
    )  # fmt: skip
    assert [profile.attention_ms(SEQ_LEN, 2, hot=hot) for hot in (0.0, 0.5, 1.0)] == [20.0, 22.0, 24.0]
    assert profile.attention_ms(SEQ_LEN, 3, hot=1.0) == pytest.approx((24.0 + 44.0) / 2), "between two sizes"


def test_a_file_keeps_it_and_a_profile_without_knows_no_load(tmp_path: Path) -> None:
    for profile in (fitted(), fitted(sustained=False)):
        profile.save(tmp_path / "profile.yaml")
        assert load(tmp_path / "profile.yaml") == profile
    assert not profile.knows_sustained
    assert profile.attention_ms(SEQ_LEN, 2, hot=1.0) == 20.0


def test_chunks_that_leave_no_pause_are_priced_at_the_hot_clock_and_others_at_the_cool_one() -> None:
    layer = Workload(SEQ_LEN, 2 * HEADS, 2)
    chunks, serial = build_schedule("hcms", "even:4", HEADS, 2), build_schedule("ulysses", "even:1", HEADS, 2)
    busy = fitted()
    assert predict(chunks, WorkloadCosts(busy, layer, sustained=True)).attention_ms == pytest.approx(4 * 12.0, rel=0.02)
    assert predict(chunks, WorkloadCosts(busy, layer)).attention_ms == pytest.approx(4 * 10.0)
    waiting = fitted(link_ms=20.0)  # four exchanges: attention is under way for a third of the time
    alone = predict(serial, WorkloadCosts(waiting, layer, sustained=True))
    assert alone.attention_ms / alone.duration_ms < COOL_DUTY
    assert alone.attention_ms == pytest.approx(44.0)


@pytest.mark.parametrize("nbytes", [3, 7, 10**7 + 1, 294_912_000, 123_456_789])
@pytest.mark.parametrize("ms", [0.3, 1.7, 13.3])
def test_a_rotation_of_one_size_has_a_finite_rate(nbytes: int, ms: float) -> None:
    """Rounding alone made a spread of one size, and its sign an infinite rate."""
    (level,) = fitted({"op": "rotate", "bytes_off_rank": nbytes, "ms": ms}).levels
    assert level.rotate_gbps == pytest.approx(nbytes / ms / 1e6)
