"""The cost model: profiles by size, their price for a workload, and the closed forms that simulation must meet."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from by_hand import cut_speedup_bound, ring_ms, ring_speedup
from hcms.schedule import catalogue
from hcms.schedule.cost import AttendPoint, Level, Profile, Workload, WorkloadCosts, fit, load, predict
from hcms.schedule.ideal import IdealCosts
from hcms.schedule.schedule import ring, serial, three_lane, two_lane
from hcms.schedule.zero import zero
from hcms_lab.report import closed_form

pytestmark = pytest.mark.t0

PROFILE = Profile(
    hardware="cpu-test-2c",
    device="cpu",
    world_size=2,
    backend="emulated",
    link="1 GB/s, 50 us",
    kernel="sdpa",
    dtype="float32",
    head_dim=128,
    batch=1,
    attend=(
        AttendPoint(1024, 1, 11.0),
        AttendPoint(1024, 5, 51.0),
        AttendPoint(4096, 1, 170.0),
        AttendPoint(4096, 5, 820.0),
    ),
    levels=(Level(gbps=1.0, latency_ms=0.05),),
    pack_ms_per_gb=300.0,
    unpack_ms_per_gb=250.0,
    merge_ms_per_gb=600.0,
    host_ms=0.1,
)
LAYER = Workload(seq_len=1024, heads=10, ranks=2, dtype="float32")


class TestAttention:
    def test_measured_points_are_kept(self) -> None:
        for point in PROFILE.attend:
            assert PROFILE.attention_ms(point.seq_len, point.heads) == pytest.approx(point.ms)

    def test_linear_in_heads_between_points(self) -> None:
        assert PROFILE.attention_ms(1024, 3) == pytest.approx(31.0)

    def test_quadratic_in_tokens_beyond_points(self) -> None:
        assert PROFILE.attention_ms(8192, 5) == pytest.approx(4 * 820.0)
        assert PROFILE.attention_ms(512, 5) == pytest.approx(51.0 / 4)
        assert PROFILE.attention_ms(1024, 10) == pytest.approx(102.0)

    def test_batch_counts_as_heads(self) -> None:
        assert PROFILE.attention_ms(1024, 1, batch=5) == pytest.approx(51.0)

    @given(st.integers(64, 20_000), st.integers(1, 20))
    def test_grows_with_tokens_and_heads(self, seq_len: int, heads: int) -> None:
        ms = PROFILE.attention_ms(seq_len, heads)
        assert 0 < ms < PROFILE.attention_ms(seq_len, heads + 1)
        assert ms < PROFILE.attention_ms(2 * seq_len, heads)

    def test_small_chunks_are_never_cheaper_than_their_share(self) -> None:
        noisy = replace(PROFILE, attend=(AttendPoint(1024, 2, 20.0), AttendPoint(1024, 5, 60.0)))
        assert noisy.attention_ms(1024, 1) == pytest.approx(10.0)

    def test_waves_on_a_gpu(self) -> None:
        # 8 tiles of 128 queries a head, 10 SMs: 1 head fills a wave to 8/10, 5 heads fill 4 waves, 2 heads need 2.
        gpu = replace(PROFILE, device="cuda", sms=10, attend=(AttendPoint(1024, 5, 40.0),))
        assert gpu.attention_ms(1024, 5) == pytest.approx(40.0)
        assert gpu.attention_ms(1024, 1) == pytest.approx(10.0)
        assert gpu.attention_ms(1024, 2) == pytest.approx(20.0)
        assert gpu.attention_ms(1024, 3) == pytest.approx(30.0)


class TestLink:
    def test_latency_and_bandwidth(self) -> None:
        assert PROFILE.exchange_ms(2e6, 2) == pytest.approx(0.05 + 2.0)
        assert PROFILE.exchange_ms(2e6, 1) == 0.0

    def test_two_levels_flow_at_the_same_time(self) -> None:
        levels = (Level(gbps=100.0, ranks=8, latency_ms=0.01), Level(gbps=10.0, latency_ms=0.1))
        two = replace(PROFILE, levels=levels)
        assert two.exchange_ms(8e6, 8) == pytest.approx(0.01 + 0.08)
        # Of 15 peers 8 are beyond the node.
        assert two.exchange_ms(15e6, 16) == pytest.approx(0.1 + 8e6 / 10e6)
        assert two.rotate_ms(10e6, 8) == pytest.approx(0.01 + 0.1)
        assert two.rotate_ms(10e6, 16) == pytest.approx(0.1 + 1.0)

    def test_more_ranks_than_the_link_connects(self) -> None:
        pair = replace(PROFILE, levels=(Level(gbps=100.0, ranks=2),))
        with pytest.raises(ValueError, match="connects at most 2 ranks, not 4"):
            pair.exchange_ms(1e6, 4)


class TestOperations:
    """Every time of a two-rank layer by hand: a head of 1,024 tokens is 1024 * 128 * 4 bytes."""

    HEAD_GB = 1024 * 128 * 4 / 1e9

    def test_cpu_exchange_of_several_heads(self) -> None:
        schedule = two_lane((2, 3))
        cost = WorkloadCosts(PROFILE, LAYER).op_cost(schedule.ops[0], schedule)
        gb = 3 * 2 * self.HEAD_GB
        assert cost.host_ms == pytest.approx(0.1 + 300 * gb)
        assert cost.lane_ms == pytest.approx(0.05 + gb / 2 * 1e3)
        assert cost.finish_ms == pytest.approx(250 * gb)

    def test_cpu_exchange_of_one_head_is_used_as_it_lies(self) -> None:
        schedule = two_lane((1, 4))
        assert WorkloadCosts(PROFILE, LAYER).op_cost(schedule.ops[0], schedule).finish_ms == 0.0

    def test_cpu_return(self) -> None:
        schedule = two_lane((2, 3))
        op = next(op for op in schedule.ops if op.kind == "return")
        cost = WorkloadCosts(PROFILE, LAYER).op_cost(op, schedule)
        assert cost.host_ms == pytest.approx(0.1)
        assert cost.lane_ms == pytest.approx(0.05 + 2 * self.HEAD_GB / 2 * 1e3)
        assert cost.finish_ms == pytest.approx(250 * 2 * self.HEAD_GB)
        batched = WorkloadCosts(PROFILE, replace(LAYER, batch=2)).op_cost(op, schedule)
        assert batched.host_ms == pytest.approx(0.1 + 300 * 2 * 2 * self.HEAD_GB)

    def test_cuda_copies_run_on_the_lane(self) -> None:
        schedule = two_lane((2, 3))
        costs = WorkloadCosts(replace(PROFILE, device="cuda"), LAYER)
        exchange, back = (next(op for op in schedule.ops if op.kind == kind) for kind in ("exchange", "return"))
        gb = 3 * 2 * self.HEAD_GB
        assert not costs.host_computes
        assert costs.op_cost(exchange, schedule).lane_ms == pytest.approx(300 * gb + 0.05 + gb / 2 * 1e3)
        assert costs.op_cost(back, schedule).lane_ms == pytest.approx(0.05 + gb / 6 * 1e3 + 250 * gb / 3)
        assert costs.op_cost(exchange, schedule).host_ms == 0.1
        assert costs.op_cost(exchange, schedule).finish_ms == 0.0

    def test_split_exchanges_carry_a_third_each(self) -> None:
        costs = WorkloadCosts(replace(PROFILE, host_ms=0.0, levels=(Level(1.0),)), LAYER)
        split, packed = serial((5,), split_qkv=True), serial((5,))
        assert predict(split, costs).duration_ms == pytest.approx(predict(packed, costs).duration_ms)
        assert costs.op_cost(split.ops[0], split).lane_ms == pytest.approx(
            costs.op_cost(packed.ops[0], packed).lane_ms / 3
        )

    def test_ring(self) -> None:
        schedule = ring(2)
        costs = WorkloadCosts(PROFILE, LAYER)
        rotate, attend = schedule.ops[0], schedule.ops[1]
        kv_gb = 2 * 512 * 10 * 128 * 4 / 1e9
        assert costs.op_cost(rotate, schedule).lane_ms == pytest.approx(0.05 + kv_gb * 1e3)
        assert costs.op_cost(rotate, schedule).host_ms == pytest.approx(0.1 + 300 * kv_gb)
        assert costs.op_cost(attend, schedule).lane_ms == pytest.approx(PROFILE.attention_ms(512, 10) + 600 * kv_gb / 2)

    def test_one_rank_communicates_nothing(self) -> None:
        costs = WorkloadCosts(PROFILE, replace(LAYER, ranks=1))
        assert predict(serial((10,)), costs).duration_ms == pytest.approx(102.0 + 2 * 0.1)

    def test_ratio_is_that_of_the_serial_schedule(self) -> None:
        costs = WorkloadCosts(PROFILE, LAYER)
        ulysses_ms = predict(serial((5,), split_qkv=True), costs).duration_ms
        assert costs.comm_ratio == pytest.approx(1 - costs.attention_ms / ulysses_ms)
        assert costs.wire_ratio < costs.comm_ratio

    def test_slowdown_needs_overlap(self) -> None:
        slow = replace(PROFILE, attention_slowdown=1.5, communication_slowdown=2.0)
        plain, slowed = (WorkloadCosts(p, LAYER) for p in (PROFILE, slow))
        for schedule in (serial((2, 3)), two_lane((5,))):
            for op in schedule.ops:
                assert slowed.op_cost(op, schedule) == plain.op_cost(op, schedule)
        schedule = two_lane((2, 3))
        attend = next(op for op in schedule.ops if op.kind == "attend")
        share = (2 * 0.05 + 4 * 5 * self.HEAD_GB / 2 * 1e3) / plain.attention_ms
        assert share < 1
        expected_ms = plain.op_cost(attend, schedule).lane_ms * (1 + 0.5 * share)
        assert slowed.op_cost(attend, schedule).lane_ms == pytest.approx(expected_ms)
        exchange = schedule.ops[0]
        assert slowed.op_cost(exchange, schedule).lane_ms == pytest.approx(
            2 * plain.op_cost(exchange, schedule).lane_ms
        )

    def test_a_third_lane_adds_no_bandwidth_to_one_port(self) -> None:
        costs, cut = IdealCosts(0.6), (1, 1, 1, 1, 1)
        two, three = predict(two_lane(cut), costs), predict(three_lane(cut), costs)
        assert three.duration_ms == pytest.approx(two.duration_ms)
        assert three.schedule.lanes == three_lane(cut).lanes
        own = predict(three_lane(cut), replace(costs, ports=2))
        assert own.duration_ms < three.duration_ms

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="10 heads cannot be divided among 4 ranks"):
            Workload(1024, 10, 4)
        with pytest.raises(ValueError, match="1023 tokens cannot be divided among 2 ranks"):
            Workload(1023, 10, 2)
        with pytest.raises(ValueError, match="dtype 'int8'"):
            Workload(1024, 10, 2, dtype="int8")


class TestClosedForms:
    """The figures that arithmetic on paper gives, and the simulator on ideal costs."""

    @pytest.mark.parametrize(
        ("ratio", "cut", "speedup"),
        [
            (0.20, (5, 5), 1.11),
            (0.20, (2, 2, 2, 2, 2), 1.19),
            (0.20, (1, 2, 4, 1, 1, 1), 1.22),
            (0.25, (1, 1, 1, 1, 1), 1.25),
            (0.25, (1, 3, 1), 1.25),
        ],
    )
    def test_simulated_speedup(self, ratio: float, cut: tuple[int, ...], speedup: float) -> None:
        costs = IdealCosts(ratio)
        whole = (sum(cut),)
        simulated = predict(serial(whole), costs).duration_ms / predict(two_lane(cut), costs).duration_ms
        assert simulated == pytest.approx(speedup, abs=0.005)
        assert simulated == pytest.approx(cut_speedup_bound(ratio, cut))
        if len(set(cut)) == 1:
            assert simulated == pytest.approx(closed_form.two_lane_speedup(ratio, len(cut)))

    @given(st.floats(0.01, 0.95), st.lists(st.integers(1, 5), min_size=1, max_size=6).map(tuple))
    def test_no_cut_beats_its_bound(self, ratio: float, cut: tuple[int, ...]) -> None:
        costs = IdealCosts(ratio)
        for schedule in (two_lane(cut), two_lane(cut, prefetch=1, first="return")):
            speedup = predict(serial((sum(cut),)), costs).duration_ms / predict(schedule, costs).duration_ms
            assert speedup <= cut_speedup_bound(ratio, cut) * (1 + 1e-9)
            assert speedup <= closed_form.speedup_limit(ratio) * (1 + 1e-9)

    @given(st.floats(0.01, 0.9), st.integers(2, 16))
    def test_ring(self, ratio: float, ranks: int) -> None:
        costs = IdealCosts(ratio, ranks)
        expected_ms = ring_ms(costs.attention_ms, costs.comm_ms, ranks)
        assert predict(ring(ranks), costs).duration_ms == pytest.approx(expected_ms)

    def test_what_a_ring_hides(self) -> None:
        assert [round(closed_form.ring_hides_up_to(ranks), 2) for ranks in (2, 4, 8)] == [0.33, 0.27, 0.18]
        assert ring_ms(1.0, 1 / 3, 8) == pytest.approx(1.46, abs=0.005)
        assert ring_speedup(0.2, 2) == pytest.approx(1.25)

    def test_traffic_of_a_ring(self) -> None:
        """A ring's steps carry P/2 times what Ulysses does, which its closed form rests on."""
        for ranks in (2, 4, 8):
            layer = Workload(32_400, 40, ranks)
            ulysses_bytes = layer.off_rank(4 * layer.tensor_bytes(layer.heads_a_rank))
            ring_bytes = (ranks - 1) * 2 * (32_400 // ranks) * 40 * 128 * 2
            assert ring_bytes == pytest.approx(ulysses_bytes * ranks / 2)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r"lies in \[0, 1\), got 1.2"):
            closed_form.speedup_limit(1.2)
        with pytest.raises(ValueError, match="at least 1 chunk, got 0"):
            closed_form.two_lane_speedup(0.2, 0)
        with pytest.raises(ValueError, match="at least 2 ranks, got 1"):
            closed_form.ring_hides_up_to(1)


WHAT: dict[str, Any] = {
    "hardware": "cpu-test-2c",
    "device": "cpu",
    "world_size": 2,
    "backend": "gloo",
    "link": "native",
    "kernel": "sdpa",
    "dtype": "float32",
    "head_dim": 128,
}


class TestFit:
    def samples(self) -> list[dict[str, object]]:
        """What ranks with the costs of PROFILE would have measured, each size three times, one of them disturbed."""
        found: list[dict[str, object]] = []
        for factor in (1.0, 1.0, 3.0):
            found += [
                {"op": "attend", "seq_len": p.seq_len, "heads": p.heads, "ms": p.ms * factor} for p in PROFILE.attend
            ]
            found += [{"op": "attend_lse", "seq_len": 1024, "heads": 5, "ms": 51.0 * 1.1 * factor}]
            found += [
                {"op": "exchange", "bytes_off_rank": b, "ms": (0.05 + b / 1e6) * factor} for b in (10**4, 10**6, 10**7)
            ]
            found += [{"op": "rotate", "bytes_off_rank": b, "ms": (0.05 + b / 2e6) * factor} for b in (10**5, 10**7)]
            found += [{"op": "pack", "bytes": b, "ms": 300 * b / 1e9 * factor} for b in (10**6, 10**7)]
            found += [{"op": "unpack", "bytes": 10**7, "ms": 2.5 * factor}, {"op": "host", "ms": 0.1 * factor}]
            found += [{"op": "merge", "bytes": 10**7, "ms": 6.0 * factor}]
            found += [{"op": "interference", "attention_slowdown": 1.04, "communication_slowdown": 0.97}]
        return found

    def test_recovers_the_costs(self) -> None:
        profile = fit(self.samples(), **WHAT)
        assert profile.attend == PROFILE.attend
        (level,) = profile.levels
        assert (level.gbps, level.latency_ms, level.rotate_gbps) == pytest.approx((1.0, 0.05, 2.0))
        found = (profile.pack_ms_per_gb, profile.unpack_ms_per_gb, profile.merge_ms_per_gb, profile.host_ms)
        assert found == pytest.approx((300.0, 250.0, 600.0, 0.1))
        assert profile.lse_slowdown == pytest.approx(1.1)
        assert (profile.attention_slowdown, profile.communication_slowdown) == (1.04, 1.0)

    def test_links_that_measure_oddly(self) -> None:
        attend = {"op": "attend", "seq_len": 1024, "heads": 1, "ms": 1.0}

        def level(*points: tuple[int, float]) -> Level:
            exchanges = [{"op": "exchange", "bytes_off_rank": b, "ms": ms} for b, ms in points]
            return fit([attend, *exchanges], **WHAT).levels[0]

        assert level((10**6, 2.0)).gbps == pytest.approx(0.5)
        assert level((10**6, 1.0), (10**7, 20.0)).latency_ms == 0.0
        assert level((10**4, 1.0), (10**6, 0.9)).gbps == math.inf

    def test_defaults(self) -> None:
        samples = [s for s in self.samples() if s["op"] in ("attend", "exchange", "pack")]
        profile = fit(samples, **WHAT)
        assert (profile.unpack_ms_per_gb, profile.merge_ms_per_gb) == pytest.approx((300.0, 600.0))
        assert (profile.host_ms, profile.attention_slowdown, profile.lse_slowdown) == (0.0, 1.0, 1.0)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="unknown op 'atend', wanted one of attend"):
            fit([{"op": "atend"}], **WHAT)
        with pytest.raises(ValueError, match="attend needs heads, ms"):
            fit([{"op": "attend", "seq_len": 5}], **WHAT)
        with pytest.raises(ValueError, match="no sample of op 'exchange': a profile of 2 ranks"):
            fit([{"op": "attend", "seq_len": 5, "heads": 1, "ms": 1.0}], **WHAT)


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "profile.yaml"
        whole = replace(PROFILE, assumed=("that the sun rises",), levels=(Level(math.inf, 0.1, 8, 2.0), Level(1.0)))
        whole.save(path)
        assert load(path) == whole
        assert "attend:\n- {seq_len: 1024, heads: 1, ms: 11.0}" in path.read_text()

    def test_json_is_read_too(self, tmp_path: Path) -> None:
        PROFILE.save(tmp_path / "profile.yaml")
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(yaml.safe_load((tmp_path / "profile.yaml").read_text())))
        assert load(path) == PROFILE

    @pytest.mark.parametrize(
        ("field", "wanted"),
        [("hardware", "other-gpu"), ("world_size", 4), ("kernel", "math"), ("dtype", "bfloat16"), ("head_dim", 64)],
    )
    def test_refuses_another_kind_by_name(self, tmp_path: Path, field: str, wanted: object) -> None:
        path = tmp_path / "profile.yaml"
        PROFILE.save(path)
        assert load(path, **{field: getattr(PROFILE, field), "batch": None}) == PROFILE
        with pytest.raises(ValueError, match=r"profile\.yaml") as caught:
            load(path, **{field: wanted})
        for part in (field, repr(getattr(PROFILE, field)), repr(wanted), "+exp=calibrate"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": 0}, "schema is 0, wanted 1"),
            ({"schema": None}, "schema is None, wanted 1"),
            ({"colour": "red"}, "unknown field 'colour'"),
            ({"host_ms": "fast"}, "host_ms is 'fast', wanted float"),
            ({"world_size": True}, "world_size is True, wanted int"),
            ({"attend": []}, "attend or levels is empty"),
            ({"attend": 3}, "attend is 3, wanted a list"),
            ({"levels": [{"speed": 3}]}, "speed"),
            ({"attend": [3]}, "attend, levels or chosen"),
        ],
    )
    def test_refuses_a_damaged_file(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        path = tmp_path / "profile.yaml"
        PROFILE.save(path)
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            load(path)

    def test_refuses_what_is_no_profile(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.yaml"
        with pytest.raises(ValueError, match="no such profile"):
            load(path)
        for text in ("just words", "a: [", "- 1", "x: 2024-99-99", "[" * 5000):
            path.write_text(text)
            with pytest.raises(ValueError, match="not a profile"):
                load(path)
        PROFILE.save(path)
        path.write_text(path.read_text().replace("kernel: sdpa\n", ""))
        with pytest.raises(ValueError, match="field kernel is missing"):
            load(path)


def test_what_waits_for_attention_goes_first_at_its_end() -> None:
    """Also where the next attention waits on a lane of its own."""
    costs = WorkloadCosts(catalogue.gpu("h100-pcie").profile(), Workload(57_600, 40, 4))
    spans = predict(zero((3, 4, 3), fill=True), costs).spans
    attends = [span for span in spans if span.op.kind == "attend"]
    back = next(span for span in spans if span.op.kind == "return" and span.op.chunk == 0)
    assert back.begin_ms == pytest.approx(attends[0].end_ms)
    assert attends[1].begin_ms >= attends[0].end_ms
