"""Whole pipelines before any rank starts: sizes, memory, refusals, the numbers that records are made of."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from math import prod
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hcms.clip import ClipShape, Strides, heads_refusal, layer_flops
from hcms.schedule.cost import Workload
from hcms_lab.ground.clip_record import ClipRecord, against_ulysses
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.records import RecordFile

pytestmark = pytest.mark.t0

pytest.importorskip("diffusers", reason="needs the extra: pip install -e '.[diffusers]'")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
run, wan, one_gpu = import_module("run"), import_module("wan"), import_module("hcms_lab.measure.wan.one_gpu")
breakdown = import_module("hcms_lab.measure.wan.breakdown")

MODELS = ("wan-tiny", "wan2.2-i2v-a14b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b")


def clip_of(name: str, frames: int) -> ClipShape:
    model = one_gpu.model_config(name)
    return ClipShape(frames, model.height, model.width, Strides.of(model.transformer, model.vae))


@pytest.mark.parametrize(
    ("name", "frames", "tokens"),
    [
        ("wan2.2-t2v-a14b", 33, 32_400),
        ("wan2.2-t2v-a14b", 61, 57_600),
        ("wan2.2-t2v-a14b", 81, 75_600),
        ("wan2.2-ti2v-5b", 121, 27_280),
        ("wan-tiny", 61, 3_840),
    ],
)
def test_tokens(name, frames, tokens):
    clip = clip_of(name, frames)
    assert clip.tokens == prod(clip.grid) == tokens
    assert all(clip.refusal(ranks) is None for ranks in (1, 2, 4, 8))


def test_traffic_is_what_wan_at_720p_sends():
    layers = [Workload(32_400, 40, ranks) for ranks in (1, 2, 4, 8)]
    mib = [round(w.off_rank(4 * w.tensor_bytes(w.heads_a_rank)) / 2**20) for w in layers]
    assert mib == [0, 316, 237, 138]


def test_attention_is_two_thirds_of_the_operations_at_61_frames():
    flops = layer_flops(57_600, 512, 5120, 13_824)
    core, rest = flops["attention"], sum(flops.values())
    assert core / rest == pytest.approx(0.66, abs=0.01)
    assert 40 * rest == pytest.approx(4.12e15, rel=0.01)


@pytest.mark.parametrize("frames", [0, 2, 32, 34, 60])
def test_frames_that_are_not_4n_plus_1_are_refused_with_two_that_are(frames):
    with pytest.raises(ValueError, match=f"frames={frames}") as refused:
        clip_of("wan2.2-t2v-a14b", frames)
    would_do = [int(x) for x in re.findall(r"\d+", str(refused.value).split("so ")[1])]
    assert would_do
    assert all(clip_of("wan2.2-t2v-a14b", f).frames % 4 == 1 for f in would_do)


def test_what_a_refusal_of_ranks_names_would_do():
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        frames, height, width = 4 * rng.integers(0, 20) + 1, 16 * rng.integers(1, 60), 16 * rng.integers(1, 60)
        ranks = int(rng.integers(2, 17))
        clip = ClipShape(int(frames), int(height), int(width), Strides())
        why = clip.refusal(ranks)
        assert (why is None) == (clip.tokens % ranks == 0)
        if why is not None:
            refused += 1
            for name in ("frames", "height", "width"):
                for number in re.findall(r"\d+", re.findall(rf"{name}=(\d+(?: or \d+)?)", why)[0]):
                    size = {"frames": clip.frames, "height": clip.height, "width": clip.width, name: int(number)}
                    assert ClipShape(**size, strides=Strides()).refusal(ranks) is None, (why, size)
    assert refused > 50


def test_heads_that_ranks_do_not_divide_are_refused_with_rank_counts():
    assert heads_refusal(12, 4, "m") is None
    assert heads_refusal(12, 5, "m") == (
        "m has 12 attention heads, which 5 ranks do not divide: use 1, 2, 3, 4, 6 or 12 ranks"
    )


@pytest.mark.parametrize("name", MODELS)
def test_configurations_compose_and_are_valid(name):
    cfg = run.composed(["+exp=fig7", f"model={name}", "memory_gib=200"])
    wan.validate(cfg)
    assert cfg.model == one_gpu.model_config(name)  # as the GPU script reads it, without an experiment


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["frames=34"], "frames=34: this model makes 4n + 1 video frames, so 33 or 37 would do"),
        (["frames=[33, many]"], "frames=many"),
        (["ranks=5"], "12 attention heads, which 5 ranks do not divide: use 1, 2, 3, 4, 6 or 12 ranks"),
        (
            ["ranks=3", "frames=1", "width=8", "height=8"],
            "1 tokens, which 3 ranks do not divide: frames=9, height=24, or width=24 would do",
        ),
        (["width=162"], "width=162: this model needs a multiple of 8 pixels, so 160 or 168 would do"),
        (["weights=some"], "weights=some: choose one of random, pretrained"),
        (["sharding=fsdp"], "sharding=fsdp: choose one of none, fsdp2"),
        (["weights=pretrained"], "model=wan-tiny is not on the hub; give weights_path=<folder>"),
        (["weights=pretrained", "weights_path=/no/such/folder"], "weights_path=/no/such/folder: no such folder"),
        (["weights_path=/tmp"], "weights=random reads none"),
        (["methods=[hcms]"], "add ulysses"),
        (["methods=[ulysses,hcsm]"], "methods=hcsm: choose one of"),
        (["cuts=[1-3-1]"], "adds up to 5 heads, but a rank has 6"),
        (["kernels=[flash]"], "kernels=flash: choose one of"),
        (["kernels=[sage]", "device=cpu"], "runs on cuda only"),
        (["steps=0"], "steps=0"),
        (["image=/no/picture.png"], "image=/no/picture.png: no such file"),
        (["model=wan2.2-t2v-a14b", "memory_gib=40"], "GiB a rank on 2 ranks, but 40.0 GiB are there"),
        (["model=wan-tiny", "+model.transformer.colour=red"], "its arguments build no model"),
    ],
)
def test_bad_input_gets_one_line_that_names_it(overrides, says):
    with pytest.raises(UsageError) as refused:
        wan.validate(run.composed(["+exp=fig7", *overrides]))
    line = str(refused.value)
    assert says in line
    assert "\n" not in line


def test_a_folder_without_weights_is_refused_by_what_it_lacks(tmp_path):
    def refusal() -> str:
        with pytest.raises(UsageError) as refused:
            wan.validate(run.composed(["+exp=fig7", "weights=pretrained", f"weights_path={tmp_path}"]))
        return str(refused.value)

    assert "no model_index.json" in refusal()
    (tmp_path / "model_index.json").write_text("{}")
    assert "does not say which pipeline" in refusal()
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "transformer/ holds no weights" in refusal()
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
        (tmp_path / part / "model.safetensors").touch()
    assert "it holds a FluxPipeline; give one of WanPipeline, WanImageToVideoPipeline" in refusal()


class _Hub(BaseHTTPRequestHandler):
    """A hub with one pipeline, `owner/whole`."""

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path.startswith("/owner/whole/") else 404)
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def test_what_the_hub_gives(tmp_path):
    def refusals(endpoint: str) -> list[str | None]:
        program = "import json, sys; from hcms_lab.measure.wan.folder import hub_refusal; "
        program += "print(json.dumps([hub_refusal(name) for name in ('owner/whole', 'owner/none')]))"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with HTTPServer(("127.0.0.1", 0), _Hub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_port}"
        whole, none = refusals(address)
        hub.shutdown()
    assert whole is None
    assert none is not None and "model_index.json" in none
    assert all(reason and "\n" not in reason for reason in refusals(address)), "unreachable is a reason too"


def test_unknown_model_and_key_are_refused_while_composing():
    with pytest.raises(UsageError, match="wan-huge"):
        run.composed(["+exp=fig7", "model=wan-huge"])
    with pytest.raises(UsageError, match="step"):
        run.composed(["+exp=fig7", "step=3"])


def test_parameters_are_the_published_ones():
    from hcms_lab.measure.wan.build import transformer_on_meta, vae_on_meta

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(transformer_on_meta(one_gpu.model_config("wan2.2-t2v-a14b"))) == 14_288_491_584
    assert count(transformer_on_meta(one_gpu.model_config("wan2.2-i2v-a14b"))) == 14_288_901_184
    assert count(transformer_on_meta(one_gpu.model_config("wan2.2-ti2v-5b"))) == 4_999_787_712
    assert count(vae_on_meta(one_gpu.model_config("wan2.2-t2v-a14b"))) == 126_892_531
    assert count(vae_on_meta(one_gpu.model_config("wan2.2-ti2v-5b"))) == 704_688_668


def test_dry_run_tells_sizes_and_refuses_what_cannot_fit(capsys):
    cfg = run.composed(["+exp=fig7", "model=wan2.2-t2v-a14b", "frames=33", "dry=true", "ranks=4", "memory_gib=80"])
    wan.validate(cfg)
    assert not wan.writes(cfg)
    assert not wan.run(cfg, None)
    said = capsys.readouterr().out
    assert "32,400 tokens" in said
    assert "237" in said  # MiB a layer on 4 ranks
    assert "no: 80 GiB" in said
    cfg.memory_gib, cfg.vae_tiling = 80.0, True
    assert wan.run(cfg, None)


def test_sharding_and_more_ranks_need_less_memory():
    from hcms_lab.measure.wan.memory import rank_counts

    model, clip = one_gpu.model_config("wan2.2-t2v-a14b"), clip_of("wan2.2-t2v-a14b", 33)
    whole = {n.ranks: n for n in rank_counts(model, clip)}
    shared = {n.ranks: n for n in rank_counts(model, clip, sharding="fsdp2")}
    assert list(whole) == [1, 2, 4, 5, 8, 10]
    assert whole[1].weight_bytes / 2**30 == pytest.approx(2 * 26.6 + 0.5 + 12.6, abs=0.5)
    assert shared[8].weight_bytes < whole[8].weight_bytes / 2.5
    assert whole[8].step_bytes < whole[2].step_bytes < whole[1].step_bytes


def test_operations_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from hcms_lab.measure.wan.build import transformer_on_meta, vae_on_meta

    for name in ("wan2.2-t2v-a14b", "wan2.2-ti2v-5b"):
        model, clip = one_gpu.model_config(name), clip_of(name, 33)
        s, t = clip.strides, model.transformer
        latents = (1, t["out_channels"], clip.latent_frames, clip.height // s.spatial, clip.width // s.spatial)
        with torch.no_grad(), FlopCounterMode(display=False) as decoding:
            vae: Any = vae_on_meta(model)
            vae.decode(torch.empty(latents, device="meta"))
        told = model.decode_mflop_a_pixel * 1e6 * clip.frames * clip.height * clip.width
        assert told == pytest.approx(decoding.get_total_flops(), rel=0.01)
        expert = transformer_on_meta(model)
        on_meta = {"device": "meta", "dtype": expert.dtype}
        text = torch.empty(1, model.text_tokens, t["text_dim"], **on_meta)
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            expert(torch.empty(latents, **on_meta), torch.empty(1, device="meta"), text)
        flops = layer_flops(
            clip.tokens, model.text_tokens, t["num_attention_heads"] * t["attention_head_dim"], t["ffn_dim"]
        )
        assert t["num_layers"] * sum(flops.values()) == pytest.approx(forward.get_total_flops(), rel=0.01)


def test_predicted_clips_follow_amdahl_and_gain_where_links_are_slow(tmp_path, capsys):
    predict = import_module("wan_predict")
    cfg = run.composed(["+exp=table4", "ranks=4", "frames=33"])
    predict.validate(cfg)
    assert predict.run(cfg, tmp_path)
    assert "32,400 tokens, 4 ranks" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {r["source"] for r in found} == {"predicted"}
    by_gpu = {(r["hardware"], r["link"], r["method"]): r for r in found}
    for (gpu, link, method), r in by_gpu.items():
        share = by_gpu[gpu, link, "ulysses"]["self_attention_share"]
        assert 0.3 < share < 0.8
        amdahl = 1 / (1 - share + share / r["attention_speedup_vs_ulysses"])
        assert r["speedup_vs_ulysses"] == pytest.approx(amdahl), (gpu, method)
    gain = {gpu: r["speedup_vs_ulysses"] for (gpu, _, method), r in by_gpu.items() if method == "hcms"}
    assert gain["l40s"] > 1.1 > gain["h200-sxm"] > 1.0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["gpu=h300"], "unknown GPU 'h300'"),
        (["model=wan-tiny"], "give a model of full size"),
        (["ranks=1"], "at least 2"),
        (["ranks=3"], "40 attention heads, which 3 ranks do not divide"),
        (["frames=32"], "29 or 33 would do"),
    ],
)
def test_predictions_that_cannot_be_made_are_refused(overrides, says):
    with pytest.raises(UsageError) as refused:
        import_module("wan_predict").validate(run.composed(["+exp=table4", *overrides]))
    assert says in str(refused.value)


def records(**times_ms: list[float]):
    """Records of methods with these clip times, of which the attention takes 40 % under ulysses."""
    made = []
    for method, times in times_ms.items():
        attention = [0.4 * u - (u - t) for u, t in zip(times_ms["ulysses"], times, strict=True)]
        made.append(
            SimpleNamespace(
                method=method.replace("_", "-"),
                times_ms=times,
                self_attention_times_ms=attention,
                attention_layer_times_ms=[a + 10 for a in attention],
                self_attention_share=0.4,
                comm_ratio=0.25,
            )
        )
    return made


def test_a_gain_in_attention_alone_agrees_with_amdahl():
    ulysses = [1000.0, 1100.0, 1050.0, 980.0, 1020.0, 1010.0]
    made = records(ulysses=ulysses, hcms=[0.93 * t for t in ulysses], ring=[1.02 * t for t in ulysses])
    against_ulysses(made, seed=0)
    base, hcms, ring = made
    assert base.speedup_vs_ulysses == base.amdahl_speedup == 1
    assert hcms.speedup_vs_ulysses == pytest.approx(1 / 0.93)
    assert hcms.attention_speedup_vs_ulysses == pytest.approx(0.4 / 0.33)
    assert hcms.amdahl_speedup == pytest.approx(1 / 0.93)
    assert hcms.amdahl_agrees
    assert hcms.speedup_interval[0] <= hcms.speedup_vs_ulysses <= hcms.speedup_interval[1]
    assert hcms.speedup_vs_ring == pytest.approx(1.02 / 0.93)
    assert ring.speedup_vs_ulysses < 1


def clip_records(frames: int) -> list[ClipRecord]:
    """Made-up clips of 1 s, of which the attention takes 400 ms and hcms saves 60; written as a run writes them."""
    made = []
    for method, saved in (("ulysses", 0.0), ("ulysses-packed", 5.0), ("hcms", 60.0), ("ring", 70.0)):
        times = [1000.0 - saved + noise for noise in (0.0, 4.0, -3.0, 2.0)]
        parts: dict[str, Any] = {f"{name}_ms": 60.0 for name in breakdown.PARTS[2:]}
        parts |= {"text_encoder_ms": 120.0, "self_attention_ms": 400.0 - saved}
        made.append(
            ClipRecord(
                exp="fig7", hardware="cpu-made-up", workload="wan-tiny", link="emulated", link_ratio=0.3, world_size=2,
                method=method, kernel="sdpa", dtype="float32", batch=1, seq_len=240 * frames, heads=12, head_dim=64,
                cut="1-4-1" if method == "hcms" else None, latency_ms=1000.0 - saved, times_ms=times, n=4,
                comm_ratio=0.3, frames=frames, num_frames=4 * frames - 3, width=160, height=96, weights="random",
                sharding="none", steps=2, guidance=4.0, guidance_2=3.0, flow_shift=5.0, experts=2, layers=2,
                self_attention_share=(400.0 - saved) / (1000.0 - saved),
                self_attention_times_ms=[400.0 - saved + noise for noise in (0.0, 4.0, -3.0, 2.0)],
                attention_layer_times_ms=[t / 2 for t in times], **parts,
            )
        )  # fmt: skip
    against_ulysses(made, seed=0)
    return made


def test_figure_and_table_show_what_records_say(tmp_path, monkeypatch):
    from hcms_lab.ground import load
    from hcms_lab.report import table4
    from hcms_lab.report.fig7 import fig7

    RecordFile(tmp_path / "records.jsonl").append([*clip_records(9), *clip_records(16)])
    table = load.records(tmp_path)
    figure = fig7(table)
    told = str(figure.get_label())
    assert len(figure.axes) == 2 * 3
    assert "At 33 frames, attention takes 40 % of a clip under Ulysses; HCMS makes it 17.6 % faster" in told
    assert "the clip 6.4 %" in told
    folder = tmp_path / "table4"
    folder.mkdir()
    predict = import_module("wan_predict")
    predict.run(run.composed(["+exp=table4", "ranks=4", "frames=33", "gpu=l40s"]), folder)
    monkeypatch.setattr(table4, "newest_runs", lambda experiment: [table])
    made = table4.table4(load.records(folder))
    is_predicted = made["hardware"].str.startswith("L40S")
    measured, predicted = made[~is_predicted], made[is_predicted]
    assert len(measured) == 2 * 3
    assert len(predicted) == 1
    assert measured["attention, predicted"].isna().all()
    assert predicted["clip, measured"].isna().all()
    hcms = measured[measured["method"] == "HCMS, 1-4-1"].iloc[0]
    assert hcms["attention, measured"].startswith("+17.6 %")
    assert hcms["clip, measured"].startswith("+6.4 %")


def test_one_step_on_one_device_adds_up():
    [record] = one_gpu.one_gpu_steps("", "wan-tiny", (5,), "cpu", torch.float32, kernels=("sdpa",), height=32, width=32)
    made = asdict(record)
    parts = ("self_attention", "self_projections", "cross_attention", "feed_forward", "transformer_rest")
    assert made["ok"]
    assert made["seq_len"] == 2 * 4 * 4
    assert sum(made[f"{p}_ms"] for p in parts) == pytest.approx(made["latency_ms"], rel=0.3)
    assert 0 < made["self_attention_share"] < 1
    json.dumps(made, allow_nan=False)
