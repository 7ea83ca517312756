"""Table 5 from records: who leads by how much, a row for every contestant, why one could not run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd
import pytest

from hcms_lab.ground.load import frame
from hcms_lab.ground.records import Record
from hcms_lab.report.table5 import table5

pytestmark = pytest.mark.t0

POINT = "3,840 tokens, ρ 0.25"
LATENCIES_MS = {
    "ulysses": 400.0,
    "ulysses-packed": 390.0,
    "hcms": 310.0,
    "ring": 330.0,
    "ceiling": 290.0,
    "peer:diffusers-ulysses": 403.0,
    "peer:deepspeed-ulysses": 410.0,
    "peer:torch-context-parallel-alltoall": 320.0,
}


def record(method: str, latency_ms: float | None, **changes: Any) -> dict[str, Any]:
    times_ms = None if latency_ms is None else [latency_ms * (1 + 0.001 * i) for i in (-1, 0, 1)]
    fields: dict[str, Any] = {
        "cut": "1-3-1" if method == "hcms" else None,
        "max_abs_err": 2e-7,
        "bitwise_equal": "ring" not in method and "parallel" not in method,
        "peak_mem_gib": 0.02,
        "hidden_fraction": 0.8,
        "version": "1.2.3" if method.startswith("peer:") else None,
    }
    case = Record(
        exp="table5", hardware="cpu", workload="wan_scaled", link="emulated", link_ratio=0.25, link_gbps=0.2,
        world_size=2, method=method, kernel="sdpa", dtype="float32", batch=1, seq_len=3840, heads=10, head_dim=128,
        comm_ratio=0.252, latency_ms=latency_ms, times_ms=times_ms, n=3, **(fields | changes),
    )  # fmt: skip
    return asdict(case)


def rows_of(table: pd.DataFrame) -> dict[str, Any]:
    return {row[""]: row for row in table.to_dict("records")}


@pytest.fixture
def records() -> list[dict[str, Any]]:
    missing = {"max_abs_err": None, "bitwise_equal": None, "peak_mem_gib": None, "hidden_fraction": None}
    absent = record("peer:yunchang-async", None, **missing, status="failed", error="ValueError: needs a GPU")
    return [*(record(method, ms) for method, ms in LATENCIES_MS.items()), absent]


def test_leads_are_over_the_fastest_peer_of_its_kind(records: list[dict[str, Any]]) -> None:
    rows = rows_of(table5(frame(records)))
    assert rows["fastest peer Ulysses"][POINT] == "diffusers-ulysses"
    assert rows["our Ulysses over it"][POINT].startswith("ulysses-packed: ×1.033 (")
    assert rows["our best HCMS over it"][POINT].startswith("hcms 1-3-1: ×1.300 (")
    against = "hcms 1-3-1 / torch-context-parallel-alltoall: ×1.032 ("
    assert rows["our best HCMS over the fastest peer ring"][POINT].startswith(against)
    assert rows["communication that HCMS hides"][POINT] == "80 %"
    assert "our auto over it" not in rows


def test_what_auto_chose_is_one_contestant_and_not_the_best_by_hand(records: list[dict[str, Any]]) -> None:
    longer = [r | {"seq_len": 4800, "comm_ratio": 0.21} for r in records]
    chosen = [
        record("hcms", 300.0, cut="auto:2-2-1"),
        record("hcms", 395.0, cut="auto:5") | {"seq_len": 4800, "comm_ratio": 0.21},
    ]
    rows = rows_of(table5(frame([*records, *longer, *chosen])))
    assert rows["our best HCMS over it"][POINT].startswith("hcms 1-3-1: ")
    assert rows["our auto over it"][POINT].startswith("hcms auto: ×1.343 (")
    assert rows["hcms auto"][POINT] == "300.0 (×1.34)"
    assert rows["hcms auto"]["4,800 tokens, ρ 0.21"] == "395.0 (×1.02)"


def test_every_contestant_is_a_row_with_its_correctness(records: list[dict[str, Any]]) -> None:
    rows = rows_of(table5(frame(records)))
    assert rows["deepspeed-ulysses"][POINT] == "410.0 (×0.98)"
    assert rows["deepspeed-ulysses"]["version"] == "1.2.3"
    assert rows["deepspeed-ulysses"]["bitwise"] == "yes"
    assert rows["ring"]["bitwise"] == "no"
    assert rows["hcms 1-3-1"]["max error"] == "2.0e-07"
    assert rows["yunchang-async"]["check"] == "needs a GPU"
    assert pd.isna(rows["yunchang-async"][POINT])


def test_a_wrong_result_leads_nowhere(records: list[dict[str, Any]]) -> None:
    wrong = [
        r | {"ok": r["method"] != "hcms", "error": r["error"] or ("wrong" if r["method"] == "hcms" else None)}
        for r in records
    ]
    rows = rows_of(table5(frame(wrong)))
    assert "our best HCMS over it" not in rows
    assert rows["hcms 1-3-1"]["check"] == "wrong"


def test_links_that_one_length_cannot_tell_apart_are_told_by_their_pace(records: list[dict[str, Any]]) -> None:
    slower = [r | {"link_ratio": 0.4, "link_gbps": 0.1} for r in records]
    columns = list(table5(frame([*records, *slower])).columns)
    assert POINT in columns and f"{POINT}, 0.1 GB/s" in columns


def test_ranks_and_heads_are_named_where_they_differ(records: list[dict[str, Any]]) -> None:
    four = [r | {"world_size": 4, "heads": 20} for r in records]
    columns = list(table5(frame([*records, *four])).columns)
    assert f"2 ranks of 5 heads, {POINT}" in columns and f"4 ranks of 5 heads, {POINT}" in columns


def test_peers_say_their_kind_and_older_records_tell_it_by_name(records: list[dict[str, Any]]) -> None:
    assert dict(frame(records)[["method", "peer_kind"]].to_numpy()) == {
        **dict.fromkeys(("ulysses", "ulysses-packed", "hcms", "ring", "ceiling"), None),
        "peer:diffusers-ulysses": "ulysses",
        "peer:deepspeed-ulysses": "ulysses",
        "peer:torch-context-parallel-alltoall": "ring",
        "peer:yunchang-async": "other",
    }
    toy = record("peer:toy", 200.0, peer_kind="ulysses")
    assert rows_of(table5(frame([*records, toy])))["fastest peer Ulysses"][POINT] == "toy"
