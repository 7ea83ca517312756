"""A record says what was measured: the slowest rank, a checked result, failures, nothing private."""

from __future__ import annotations

import json
import math
import socket
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from hcms.hardware import Hardware, slugify
from hcms.kernels import KERNELS
from hcms.transport.layout import HeadExchange
from hcms_lab.ground.records import SCHEMA, Record, RecordFile
from hcms_lab.measure import recording
from hcms_lab.measure.cases import Case, Point
from hcms_lab.measure.environment import VARIABLES, environment
from hcms_lab.measure.job import Job
from hcms_lab.measure.measure import measure_point
from ranks import Place, on_ranks

pytestmark = pytest.mark.t1

FIXED_NAMES = [
    *("schema", "exp", "status", "source", "hardware", "workload"),
    *("link", "transport", "link_ratio", "link_gbps", "world_size", "method", "kernel"),
    *("dtype", "batch", "seq_len", "heads", "head_dim", "cut"),
    *("schedule", "comm_ratio", "comm_ms", "attention_ms", "latency_ms", "latency_iqr_ms"),
    *("times_ms", "ceiling_ms", "speedup_vs_ulysses", "speedup_vs_ring", "hidden_fraction"),
    *("host_ms", "load", "sm_clock_mhz", "power_w", "peak_mem_gib"),
    *("max_abs_err", "bitwise_equal", "ok", "requested_path", "actual_path", "seed"),
    "error",
]


def record(method: str = "ulysses", **values: Any) -> Record:
    return Record(exp="fig3", hardware="here", workload="tiny", world_size=2, method=method, **values)


def test_fixed_names() -> None:
    names = [field.name for field in fields(Record)]
    assert names[: len(FIXED_NAMES)] == FIXED_NAMES
    assert {"frames", "prefetch", "n", "latency_p95_ms", "warmup", "predicted_ms", "plan_reason"} <= set(names)
    assert record().schema == SCHEMA
    assert record().source == "measured"


def test_records_are_flat_lines_that_come_back(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    assert file.read() == []
    written = [record(latency_ms=1.5, times_ms=[1.0, 2.0]), record("hcms", ok=False, error="a 'quoted' ρ\nline")]
    file.append(written[:1])
    file.append(written[1:])
    assert file.read() == [asdict(r) for r in written]
    lines = file.path.read_text().splitlines()
    assert len(lines) == 2
    values = json.loads(lines[0])
    assert not any(isinstance(value, dict) for value in values.values())
    assert values["max_abs_err"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_lacks_are_not_written(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RecordFile(tmp_path / "records.jsonl").append([record(latency_ms=value)])


def test_a_line_cut_short_is_left_out_and_replaced(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append([record(seed=s) for s in range(3)])
    content = file.path.read_bytes()
    file.path.write_bytes(content[:-20])
    assert [r["seed"] for r in file.read()] == [0, 1]
    file.append([record(seed=7)])
    assert [json.loads(line)["seed"] for line in file.path.read_text().splitlines()] == [0, 1, 7]


def test_records_measured_again_take_the_place_of_those_of_an_earlier_segment(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    RecordFile(path).append([record(seed=s, status="failed") for s in range(3)])
    RecordFile(path).append([record("hcms", cut="auto", seed=0)])
    later = RecordFile(path)
    later.append([record(seed=1, latency_ms=1.0), record(seed=7)])
    later.append([record("hcms", cut="auto:1-3", seed=0, latency_ms=2.0)])
    found = later.read()
    assert [(r["seed"], r["status"], r["latency_ms"]) for r in found] == [
        *((0, "failed", None), (1, "done", 1.0), (2, "failed", None), (0, "done", 2.0), (7, "done", None))
    ]
    later.append([record(seed=7)])
    assert [r["seed"] for r in later.read()] == [0, 1, 2, 0, 7, 7], "its own records are never replaced"
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]


def test_an_errors_text_tells_no_path_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "correct-horse-battery")
    monkeypatch.setattr(socket, "gethostname", lambda: "lab-node-17.example.org")
    text = "OSError: /home/jane/x.so on lab-node-17 with correct-horse-battery and hf_" + "a" * 30
    file = RecordFile(tmp_path / "records.jsonl")
    file.append([record(error=text, ok=False)])
    (found,) = file.read()
    assert found["error"] == (
        "OSError: <path> on <the host's short name> with <the value of $SOME_TOKEN> and <a Hugging Face token>"
    )


def test_what_records_say_of_each_other() -> None:
    found = [
        record("ulysses", latency_ms=100.0, attention_ms=75.0),
        record("ulysses-packed", latency_ms=98.0),
        record("hcms", latency_ms=80.0),
        record("ring", latency_ms=90.0),
        record("ceiling", latency_ms=74.0),
        record("hcms-3lane", status="failed", ok=False),
    ]
    recording._compare(found)
    hcms = found[2]
    assert hcms.speedup_vs_ulysses == 1.25
    assert hcms.speedup_vs_ring == 1.125
    assert hcms.hidden_fraction == (98 - 80) / (98 - 74)
    assert all(r.comm_ratio == 0.25 and r.ceiling_ms == 74.0 for r in found)
    assert found[-1].speedup_vs_ulysses is None


def test_the_environment_names_what_explains_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "SECRET", "HOME"):
        monkeypatch.setenv(name, "tell-nobody")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = environment(Hardware("A CPU, 2 cores", "cpu-a-cpu-2c", 1, 2), "emulated", "cpu")
    text = json.dumps(facts)
    assert "tell-nobody" not in text
    assert facts["variables"]["OMP_NUM_THREADS"] == "3"
    assert set(facts["variables"]) <= set(VARIABLES)
    assert facts["hardware"] == {"name": "A CPU, 2 cores", "slug": "cpu-a-cpu-2c", "count": 1, "cores": 2}
    assert {"commit", "dirty", "link", "python", "versions", "started", "torch", "cuda", "driver"} <= facts.keys()
    assert facts["torch"]


def test_a_copy_of_the_tree_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever history the copy lies in."""
    monkeypatch.setenv("HCMS_COMMIT", "a" * 40)
    facts = environment(Hardware("A CPU, 2 cores", "cpu-a-cpu-2c", 1, 2), "emulated", "cpu")
    assert (facts["commit"], facts["dirty"]) == ("a" * 40, None)


def test_slugs() -> None:
    assert slugify("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


CASES = (
    *(Case(method, None) for method in ("ulysses", "ulysses-packed", "ring", "ceiling")),
    *(Case(method, "1-1") for method in ("hcms-serial", "hcms", "hcms-3lane")),
)
POINT = Point("tiny", 2, 2, 32, 4, 16, 2, "float32", "sdpa", None, CASES)
JOB = Job(
    exp="fig3",
    hardware="here",
    link="native",
    gbps=None,
    latency_us=0.0,
    ratio_at="longest",
    iterations=5,
    warmup=1,
    seed=3,
    profile=None,
    predict=False,
    ranks_per_core=1.0,
    points=(POINT,),
    folder="",
)


RECEIVE_BACK = HeadExchange.receive_back


def times(factor: float) -> Any:
    """A receive that multiplies the first chunk of several by a factor."""

    def receive_back(self: HeadExchange, chunk: int, *own: Any) -> None:
        if chunk == 0 and len(self._chunks) > 1:
            self._chunks[chunk].returns[0].slots.recv.mul_(factor)
        RECEIVE_BACK(self, chunk, *own)

    return receive_back


def measured(place: Place, folder: str, fault: str) -> list[dict[str, Any]]:
    """The records of one point, with something wrong in what is measured."""
    attend = KERNELS["sdpa"].attend

    def slowly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sleep(0.02 * place.rank)
        return attend(q, k, v)

    faults = {
        "": nullcontext(),
        "a wrong chunk": patch.object(HeadExchange, "receive_back", times(1.5)),
        "another rounding": patch.object(HeadExchange, "receive_back", times(1 + 2**-23)),
        "an exchange that is not made": patch.object(HeadExchange, "exchange", lambda *_: None),
        "a slow rank": patch.dict(KERNELS, {"sdpa": replace(KERNELS["sdpa"], attend=slowly)}),
        "a plan that does not fit": nullcontext(),
    }
    point = POINT
    if fault == "a plan that does not fit":
        point = replace(POINT, cases=(Case("hcms", "1-1"), Case("ulysses", None), Case("hcms", "3-1")))
    ticks: list[str] = []
    with faults[fault]:
        found = measure_point(place, replace(JOB, folder=folder), point, None, ticks.append)
    assert len(ticks) == (JOB.iterations if place.first else 0)
    return [asdict(r) for r in found]


def test_records_of_a_point(tmp_path: Path) -> None:
    first, second = on_ranks(2, measured, str(tmp_path), "")
    assert first == second
    assert [(r["method"], r["cut"]) for r in first] == [(c.method, c.cut) for c in CASES]
    for r in first:
        assert (r["status"], r["ok"], r["error"]) == ("done", True, None)
        assert r["bitwise_equal"] == (r["method"] != "ring")
        assert 0 < r["max_abs_err"] <= 3 * r["kernel_max_abs_err"] + 1e-6
        assert r["n"] == len(r["times_ms"]) == JOB.iterations
        assert r["latency_ms"] == pytest.approx(median(r["times_ms"]))
        if r["method"] == "ceiling":  # counts the attention alone
            assert r["latency_ms"] == pytest.approx(r["attention_ms"])
        else:
            assert 0 < r["attention_ms"] < r["latency_ms"]
        assert r["peak_mem_gib"] > 0
        assert (r["seq_len"], r["heads"], r["head_dim"], r["batch"], r["world_size"]) == (32, 4, 16, 2, 2)
        assert (r["exp"], r["link"], r["link_gbps"], r["seed"], r["frames"]) == ("fig3", "native", None, 3, 2)
    found = {r["method"]: r for r in first}
    assert found["hcms"]["requested_path"] == "hcms/1-1/sdpa"
    assert found["hcms"]["actual_path"] == "two-lane/prefetch=all/exchange-first/1-1/sdpa-flash/gloo/overlapped"
    assert found["hcms-serial"]["actual_path"] == "serial/1-1/sdpa-flash/gloo/serial"
    assert found["ring"]["schedule"] == "ring"
    traces = [json.loads(path.read_text()) for path in sorted((tmp_path / "traces").glob("*.json"))]
    assert len(traces) == len(CASES)
    assert all(trace["traceEvents"] for trace in traces)


def by_method(folder: Path, fault: str) -> dict[str, dict[str, Any]]:
    return {r["method"]: r for r in on_ranks(2, measured, str(folder), fault)[0]}


def test_a_wrong_result_is_not_ok(tmp_path: Path) -> None:
    """No time without its correctness: the row stays, and says that it is wrong."""
    found = by_method(tmp_path, "a wrong chunk")
    for method in ("hcms-serial", "hcms", "hcms-3lane"):
        wrong = found[method]
        assert (wrong["ok"], wrong["status"], wrong["bitwise_equal"]) == (False, "failed", False)
        assert wrong["error"].startswith("wrong result: error ")
        assert wrong["max_abs_err"] > 0.05
        assert wrong["latency_ms"] is wrong["times_ms"] is None  # a wrong result has no time
    assert all(found[method]["ok"] for method in ("ulysses", "ulysses-packed", "ring", "ceiling"))


def test_an_exchange_that_is_not_made_is_not_ok(tmp_path: Path) -> None:
    """It would look fast; poisoned buffers tell."""
    found = by_method(tmp_path, "an exchange that is not made")
    for method in ("ulysses", "ulysses-packed", "hcms"):
        assert (found[method]["ok"], found[method]["status"]) == (False, "failed")
        assert found[method]["max_abs_err"] is None  # not a number
    assert found["ring"]["ok"]


def test_another_rounding_is_ok_but_not_bitwise(tmp_path: Path) -> None:
    found = by_method(tmp_path, "another rounding")
    for method in ("hcms-serial", "hcms", "hcms-3lane"):
        assert (found[method]["ok"], found[method]["bitwise_equal"]) == (True, False)
    assert found["ulysses-packed"]["bitwise_equal"] is True


def test_the_slowest_rank_counts(tmp_path: Path) -> None:
    for found in on_ranks(2, measured, str(tmp_path), "a slow rank"):
        for r in found:
            if r["method"] in ("ceiling", "ulysses"):
                assert min(r["times_ms"]) >= 20
                assert r["attention_ms"] >= 20


def test_a_case_that_cannot_run_is_a_row(tmp_path: Path) -> None:
    """Its plan has four heads for a rank's two: it fails on all ranks alike, and the others are measured."""
    good, ulysses, bad = on_ranks(2, measured, str(tmp_path), "a plan that does not fit")[0]
    assert good["ok"]
    assert ulysses["ok"]
    assert (bad["ok"], bad["status"], bad["latency_ms"]) == (False, "failed", None)
    assert bad["error"] == "ValueError: cut '3-1' adds up to 4 heads, but a rank has 2"
