"""SMs kept for communication, as predicted and planned; on a card they are tested in `test_own_sms.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hcms.schedule import catalogue
from hcms.schedule.advice import KEPT_SMS, advise
from hcms.schedule.cost import Workload, WorkloadCosts, predict
from hcms.schedule.plan import Setting
from hcms.schedule.timeline import Timeline
from hcms.schedule.zero import zero
from hcms.shortlist import shortlist

pytestmark = pytest.mark.t0


def costs_on(gpu: str, ranks: int = 4) -> WorkloadCosts:
    return WorkloadCosts(catalogue.gpu(gpu).profile(), Workload(57_600, 40, ranks), graph=True)


def test_sms_kept_for_communication_free_its_exchanges_and_slow_attention() -> None:
    costs = costs_on("h100-pcie")
    assert costs.holds_sms
    assert costs.wire_needs_sms
    shared, few, many = (predict(zero((1, 2, 4, 2, 1), comm_sms=sms), costs) for sms in (0, 8, 64))
    assert few.duration_ms < 0.9 * shared.duration_ms
    assert few.duration_ms < many.duration_ms

    def attention_ms(timeline: Timeline) -> float:
        return sum(s.end_ms - s.begin_ms for s in timeline.spans if s.op.kind == "attend")

    assert attention_ms(shared) <= attention_ms(few) < attention_ms(many)
    for timeline in (few, many):  # an exchange takes its own time, whatever attends
        exchanges = [s for s in timeline.spans if s.op.kind == "exchange"]
        assert exchanges[2].end_ms - exchanges[2].begin_ms < 3 * (exchanges[1].end_ms - exchanges[1].begin_ms)


def test_an_exchange_on_sms_of_its_own_slows_no_attention_but_by_those() -> None:
    """A slowdown is measured on shared SMs: beside an exchange that has some to itself attention has the rest."""
    profile = catalogue.gpu("h100-pcie").profile()
    workload = Workload(57_600, 40, 4)
    kept, shared = zero((1, 4, 4, 1), comm_sms=8), zero((1, 4, 4, 1))

    def costs(slowdown: float, persistent: bool) -> WorkloadCosts:
        return WorkloadCosts(replace(profile, attention_slowdown=slowdown, holds_sms=persistent), workload, graph=True)

    for persistent in (True, False):
        assert predict(kept, costs(1.5, persistent)) == predict(kept, costs(1.0, persistent))
    assert predict(shared, costs(1.5, False)).duration_ms > 1.1 * predict(shared, costs(1.0, False)).duration_ms
    # On shared SMs that attention holds, an exchange waits for its end: nothing of the two is at once.
    assert predict(shared, costs(1.5, True)) == predict(shared, costs(1.0, True))


def test_as_many_as_there_are_is_never_the_fastest() -> None:
    costs = costs_on("h100-pcie")
    some, all_of_them = (predict(zero((1, 4, 4, 1), comm_sms=sms), costs).duration_ms for sms in (8, 10_000))
    assert all_of_them > 10 * some > 0


def test_a_shortlist_tries_its_best_with_and_without() -> None:
    """Where exchanges wait for attention; nowhere else, and never where none may be kept."""
    blocked = costs_on("h100-pcie")
    plans = shortlist(blocked, 10, Setting(4, comm_sms=KEPT_SMS), ["hcms-zero"])
    kept = [plan for plan in plans if plan.comm_sms]
    best = next(plan for plan in plans if plan.method == "hcms-zero")
    assert best.comm_sms in KEPT_SMS
    assert {0, KEPT_SMS[0]} <= {plan.comm_sms for plan in plans if (plan.cut, plan.ends) == (best.cut, best.ends)}
    assert kept
    assert not [plan for plan in shortlist(blocked, 10, Setting(4), ["hcms-zero"]) if plan.comm_sms]
    assert not [plan for plan in shortlist(blocked, 10, Setting(4, comm_sms=KEPT_SMS), ["hcms"]) if plan.comm_sms]


def test_advice_says_what_kept_sms_would_give() -> None:
    slow, fast, other = (advise(catalogue.gpu(name), Workload(46_800, 40, 4)) for name in ("h100-pcie", "h100", "l40s"))
    assert slow.kept_gain is not None
    assert slow.kept_low is not None
    assert slow.gain < 0.1 < slow.kept_low <= slow.kept_gain
    assert slow.kept_sms in KEPT_SMS
    assert fast.kept_gain is not None
    assert fast.kept_gain < 0.05, "over NVLink they cost about what they hide"
    assert (other.kept_gain, other.kept_low, other.kept_sms) == (None, None, 0), "its kernel lets others in"
