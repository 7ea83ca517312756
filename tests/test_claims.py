"""Table 1's verdicts follow their rules: evidence graded by link, no luck of the pick, no noise that correlates."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hcms_lab.ground.load import frame, newest_runs
from hcms_lab.report import judge_clips, judge_ratio, stats
from hcms_lab.report.claims import claims
from hcms_lab.report.evidence import NOT_YET, UNTOLD, Finding
from hcms_lab.report.judge_ratio import correlation_in_words, correlation_of_gains
from hcms_lab.report.table1 import JUDGES, findings, short, table1
from made_runs import make_run

pytestmark = pytest.mark.t0

CUTS = ("5", "1-1-1-1-1", "2-1-2", "1-3-1", "auto:1-3-1")
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.45)
H100, H200 = "nvidia-h100-80gb-hbm3", "nvidia-h200"


def judged(root: Path) -> dict[str, Finding]:
    return findings(partial(newest_runs, root=root))


def verdict(root: Path, claim: str) -> str:
    return judged(root)[claim].verdict


def commit(root: Path, exp: str, slug: str, **options: Any) -> Path:
    return make_run(root, exp, slug=slug, committed=True, **options)


def test_every_claim_has_a_rule_and_no_records_means_not_run_yet(tmp_path: Path) -> None:
    assert list(claims()) == [f"C{i}" for i in range(1, 10)] == list(JUDGES)
    assert all("Holds:" in claim.rule or claim.rule.startswith("As C") for claim in claims().values())
    read = partial(newest_runs, root=tmp_path)
    assert set(short(read)["verdict"]) == {NOT_YET}
    assert set(table1(read)["verdict"]) == {NOT_YET}


def test_verdicts_follow_their_rules(tmp_path: Path) -> None:
    for slug in ("cpu-made-up", "cpu-other"):
        commit(tmp_path, "fig3", slug, frames=(9, 16), ranks=(4,))
        commit(tmp_path, "fig4", slug, ranks=(2, 4, 8), frames=(9,))
        commit(tmp_path, "fig5", slug, ratios=RATIOS, frames=(9,), cuts=CUTS)
    commit(tmp_path, "table2", "cpu-made-up", cuts=("2-1-2", "1-1-1-1-1"), frames=(1,))
    commit(tmp_path, "table3", "cpu-made-up", frames=(9,))
    by_claim = judged(tmp_path)
    assert by_claim["C1"].verdict == "mechanism shown", "×1.2 on an emulated link"
    assert by_claim["C1"].short == "Cpu Made Up +20.0 %; Cpu Other +20.0 % (emulated link)"
    assert by_claim["C2"].verdict == "not shown on an ideal link", (
        "the made-up ring takes 1.1, HCMS 1.11 of the attention"
    )
    assert by_claim["C3"].verdict == "mechanism shown"
    assert by_claim["C4"].verdict == by_claim["C5"].verdict == NOT_YET
    assert by_claim["C6"].verdict == "mechanism shown"
    assert by_claim["C7"].verdict == "mechanism shown", "+8.7 % at 10 %, +19 % at 20 % with five chunks"
    assert by_claim["C8"].verdict == "holds"
    assert by_claim["C9"].verdict == "in part, on an ideal link", "SDPA kernels alone"
    table = table1(partial(newest_runs, root=tmp_path))
    assert all(f"+exp={claims()[row['']].experiment}" in row["command"] for row in table.to_dict("records") if row[""])


def test_two_ranks_say_nothing_of_four_gpus(tmp_path: Path) -> None:
    make_run(tmp_path, "fig3", ranks=(2,))
    assert verdict(tmp_path, "C1") == NOT_YET
    commit(tmp_path, "fig8", "cpu-made-up", ranks=(4,), frames=(9,))
    assert verdict(tmp_path, "C1") == "mechanism shown", "figures 3, 4 and 8 together"


def test_an_automatic_cut_is_no_evidence_for_a_fixed_one(tmp_path: Path) -> None:
    make_run(tmp_path, "fig3", ranks=(4,), cuts=("auto:1-3-1",))
    assert verdict(tmp_path, "C1") == NOT_YET


# --- grades ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "changes", "expected"),
    [
        (H100, {"link": "native"}, "holds"),
        (H100, {"link": "ghost"}, "holds on one card"),
        (H100, {"link": "shared"}, "holds on one card"),
        ("cpu-made-up", {"link": "emulated"}, "mechanism shown"),
        ("cpu-made-up", {"link": "native"}, "mechanism shown"),
        (H100, {"link": "native", "actual_path": "two-lane/1-3-1/sdpa/gloo/overlapped"}, "mechanism shown"),
    ],
)
def test_device_and_backend_grade_a_link(tmp_path: Path, slug: str, changes: dict[str, Any], expected: str) -> None:
    commit(tmp_path, "fig3", slug, ranks=(4,), **changes)
    assert verdict(tmp_path, "C1") == expected


def test_a_negative_is_as_mild_as_its_evidence(tmp_path: Path) -> None:
    expected = {
        "native": "does not hold",
        "ghost": "does not hold on one card",
        "emulated": "not shown on an ideal link",
    }
    for link, words in expected.items():
        commit(tmp_path / link, "fig3", "cpu-x" if link == "emulated" else H100, ranks=(4,), link=link)
        assert verdict(tmp_path / link, "C2") == words


def test_the_best_grade_decides_and_no_two_links_share_a_row(tmp_path: Path) -> None:
    commit(tmp_path, "fig3", "cpu-made-up", ranks=(4,))
    commit(tmp_path, "fig3", H100, ranks=(4,), ratios=(0.02,), link="ghost", link_ratio=None)
    commit(tmp_path, "fig4", H100, ranks=(4,), frames=(9,), link="shared", link_ratio=None)
    finding = judged(tmp_path)["C1"]
    assert [(e.over, e.verdict) for e in finding.evidence] == [
        ("ghost link", "does not hold on one card"),
        ("shared link", "holds on one card"),
        ("emulated link", "mechanism shown"),
    ]
    assert finding.verdict == "in part, on one card"
    assert "emulated" not in finding.short
    assert "one rank of 4, ghost link" in finding.evidence[0].on
    rows = table1(partial(newest_runs, root=tmp_path))
    of_c1 = rows.iloc[list(rows[""]).index("C1") : list(rows[""]).index("C2")]
    assert list(of_c1["this says"]) == [e.verdict for e in finding.evidence]


def test_loads_are_evidence_apart(tmp_path: Path) -> None:
    """A third of a rested gain is the power limit's: the two never share a row."""
    for load in ("sustained", "rested"):
        commit(
            tmp_path, "fig3" if load == "rested" else "fig4", H100, ranks=(4,), link="ghost", link_ratio=None, load=load
        )
    places = [evidence.on for evidence in judged(tmp_path)["C1"].evidence]
    assert sorted(re.findall(r"(\w+) load", " ".join(places))) == ["rested", "sustained"]


def test_a_short_cell_is_short(tmp_path: Path) -> None:
    for slug in (H100, H200):
        folder = commit(tmp_path, "fig3", slug, ranks=(4,), link="ghost", link_ratio=None)
        env = folder / "env.json"
        env.write_text(env.read_text().replace("Nvidia H100 80Gb Hbm3", "NVIDIA H100 80GB HBM3"))
    table = short(partial(newest_runs, root=tmp_path))
    assert list(table.columns) == ["claim", "paper", "ours, best evidence", "verdict"]
    assert table["ours, best evidence"][0].startswith("H100 +20.0 %; ")
    assert max(map(len, table["ours, best evidence"])) < 80


def test_platforms_need_two_types_with_two_counts(tmp_path: Path) -> None:
    commit(tmp_path, "fig4", H100, ranks=(2, 4, 8), frames=(9,), link="ghost", link_ratio=None)
    finding = judged(tmp_path)["C3"]
    assert finding.verdict == "in part, on one card"
    assert finding.wanting == "two hardware types with two rank counts each"
    commit(tmp_path, "fig4", H200, ranks=(2, 4, 8), frames=(9,), link="ghost", link_ratio=None)
    assert verdict(tmp_path, "C3") == "holds on one card"


# --- no luck, no shared noise ----------------------------------------------------------------------------------------


def noisy_point(rng: np.random.Generator, seq_len: int, cuts: int, rounds: int = 12) -> list[dict[str, Any]]:
    """Methods that all take the same time but for 3 % noise: nothing is faster than anything."""

    def case(method: str, cut: str | None = None) -> dict[str, Any]:
        times_ms = (100 * rng.normal(1, 0.03, rounds)).tolist()
        return {
            "source": "measured", "status": "done", "ok": True, "hardware": "nvidia-x", "workload": "w",
            "link": "ghost", "world_size": 4, "method": method, "cut": cut, "kernel": "sdpa", "dtype": "bfloat16",
            "batch": 1, "seq_len": seq_len, "heads": 40, "head_dim": 128, "n": rounds, "times_ms": times_ms,
            "latency_ms": float(np.median(times_ms)), "attention_ms": 75.0,
        }  # fmt: skip

    rows = [case("ulysses"), *(case("hcms", f"{i}-{20 - i}") for i in range(1, cuts + 1))]
    for row in rows:
        row["comm_ratio"] = 1 - 75.0 / rows[0]["latency_ms"]
    return rows


def test_a_cut_that_was_lucky_in_its_rounds_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    rng = np.random.default_rng(0)
    table = frame([row for i in range(60) for row in noisy_point(rng, 4 * (i + 1), cuts=12)])
    over = stats.speedups(table, "ulysses")
    lucky = stats.fastest(over)["speedup"].mean() - 1
    scored = stats.gains(table, "ulysses")
    assert len(scored) == 60
    assert lucky > 0.012, "the best of twelve equal cuts looks faster"
    assert abs(scored["speedup"].mean() - 1) < 0.004, "scored on rounds that did not pick it, it is not"


def test_ratio_and_gain_share_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no effect at all a correlation of gain and ratio is none; from the same rounds it looks like 0.6."""
    monkeypatch.setattr(stats, "RESAMPLES", 20)
    rng = np.random.default_rng(1)
    shared, apart = [], []
    for _ in range(60):
        table = frame([row for i in range(6) for row in noisy_point(rng, 4 * (i + 1), cuts=1)])
        same = stats.gains(table, "ulysses")
        shared.append(stats.rank_correlation(same["comm_ratio"], same["speedup"]))
        points = judge_ratio.ratio_gains(table)
        apart.append(stats.rank_correlation(points["ratio"], points["speedup"]))
    assert np.mean(shared) > 0.4
    assert abs(np.mean(apart)) < 0.15


def test_a_ratio_that_was_set_is_the_one_that_counts(tmp_path: Path) -> None:
    make_run(tmp_path, "fig5", ratios=RATIOS, frames=(9,))
    (table,) = newest_runs("fig5", tmp_path)
    assert judge_ratio.ratio_gains(table)["ratio"].tolist() == list(RATIOS)


def test_ratio_claims_want_two_hardware_types_or_two_lengths(tmp_path: Path) -> None:
    make_run(tmp_path, "fig5", ratios=RATIOS, frames=(9,), cuts=CUTS)
    by_claim = judged(tmp_path)
    assert [by_claim[name].verdict for name in ("C6", "C7")] == ["in part, on an ideal link"] * 2
    assert by_claim["C6"].wanting == "two hardware types or two lengths"
    commit(tmp_path, "fig5", "cpu-other", ratios=RATIOS, frames=(9,), cuts=CUTS)
    assert [verdict(tmp_path, name) for name in ("C6", "C7")] == ["mechanism shown"] * 2


def test_a_correlation_is_no_surer_than_its_points() -> None:
    gain = pd.Series([1.02, 1.05, 1.1, 1.2, 1.4])
    points = pd.DataFrame({"ratio": RATIOS, "speedup": gain})

    def correlation(half: float, count: int = 5) -> stats.Interval:
        wide = points.assign(speedup_low=gain - half, speedup_high=gain + half)
        return correlation_of_gains(wide.head(count))

    assert correlation(1e-6)[:3] == pytest.approx((1, 1, 1))
    assert correlation(0.5).low < 0.5
    assert np.isnan(correlation(1e-6, count=4).low), "four points are in order by chance once in 24 times"
    assert correlation_in_words(correlation(1e-6, count=4)) == "Spearman 1.00"


# --- clips and bits --------------------------------------------------------------------------------------------------


def clips(n: int, cuts: tuple[str, ...] = ("1-3-1", "5"), **changes: Any) -> pd.DataFrame:
    """Records of clips, the experiment's first cut first; later ones are faster."""
    rows = [
        {
            "source": "measured", "status": "done", "ok": True, "hardware": "cpu-x", "workload": "wan-tiny",
            "link": "emulated", "world_size": 2, "method": "hcms", "cut": cut, "heads": 6, "head_dim": 128,
            "num_frames": 61, "n": n, "times_ms": [1.0] * n, "latency_ms": 1.0, "comm_ratio": 0.3,
            "speedup_vs_ulysses": 1.1 + i, "speedup_interval": [1.05 + i, 1.15 + i],
        } | changes
        for i, cut in enumerate(cuts)
    ]  # fmt: skip
    return frame(rows)


def of_clips(table: pd.DataFrame) -> Finding:
    read = {"fig7": [table]}.get
    return judge_clips.of_clips("speedup_vs_ulysses", "speedup_interval", claims()["C4"], lambda exp: read(exp) or [])


def test_a_clips_row_is_fixed_beforehand_and_has_eight_clips() -> None:
    finding = of_clips(clips(8))
    assert finding.short == "cpu-x hcms +10.0 % (emulated link)", "the first cut, not the best"
    assert finding.verdict == "mechanism shown"
    assert "hcms 1-3-1" in finding.evidence[0].on
    few = of_clips(clips(7))
    assert few.verdict == UNTOLD
    assert "fewer than 8 clips" in few.evidence[0].measured


def test_clips_are_judged_by_hcms_zero_where_it_ran_with_the_papers_lanes_beside() -> None:
    ours = clips(8, ("1-4-1",), method="hcms-zero", speedup_vs_ulysses=1.3, speedup_interval=[1.2, 1.4])
    finding = of_clips(pd.concat([clips(8), ours], ignore_index=True))
    assert finding.short == "cpu-x hcms-zero +30.0 %, hcms +10.0 % (emulated link)"
    assert "hcms-zero 1-4-1" in finding.evidence[0].on


def test_a_small_model_on_gpus_shows_the_mechanism() -> None:
    on_gpus: dict[str, Any] = {"hardware": H100, "link": "native"}
    assert of_clips(clips(8, **on_gpus)).verdict == "mechanism shown"
    assert of_clips(clips(8, **on_gpus, heads=40)).verdict == "holds"


def test_equivalence_counts_uneven_cuts_that_were_asked_for(tmp_path: Path) -> None:
    make_run(tmp_path, "table2", cuts=("5", "1-1-1-1-1", "auto:5", "auto:1-3-1"), frames=(1,))
    assert verdict(tmp_path, "C8") == NOT_YET
    commit(tmp_path, "table2", "cpu-other", cuts=("2-3",), frames=(1,))
    finding = judged(tmp_path)["C8"]
    assert finding.verdict == "holds"
    assert re.search(r"^2 of 2 bitwise equal", finding.evidence[0].measured), "hcms and hcms-serial"
