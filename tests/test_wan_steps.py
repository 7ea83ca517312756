"""Denoising steps, timed method against method, of which whole clips are composed: by ranks, and as a ghost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tiny as tiny_run
from ghost_on_host import HostWire, ghost_on_host
from hcms.attention import SequenceParallelAttention
from hcms.clip import ClipShape, Strides
from hcms_lab.ground.records import RecordFile
from hcms_lab.measure.cases import Case, Point
from hcms_lab.measure.job import Job
from hcms_lab.measure.launch import Rank
from tiny_wan import TRANSFORMER, VAE, tiny

pytestmark = pytest.mark.t1

steps = import_module("hcms_lab.measure.wan.steps")
breakdown = import_module("hcms_lab.measure.wan.breakdown")
clip_job = import_module("hcms_lab.measure.wan.clip_job")
denoising = import_module("hcms_lab.measure.wan.denoising")

RANKS, ROUNDS = 4, 3
MODEL = replace(tiny(), steps=2, guidance=4.0)
CLIP = ClipShape(9, 32, 48, Strides.of(TRANSFORMER, VAE))
CASES = (Case("ulysses", None), Case("ulysses-packed", None), Case("hcms", "1-1"), Case("ring", None))


def job(folder: Path, **changes: Any) -> Any:
    made = Job(
        exp="fig7", hardware="cpu-x", link="ghost", gbps=None, latency_us=0.0, ratio_at="longest", iterations=ROUNDS,
        warmup=1, seed=0, profile=None, predict=False, ranks_per_core=None, points=(), folder=str(folder),
    )  # fmt: skip
    point = Point("tiny", RANKS, CLIP.latent_frames, CLIP.tokens, 8, 12, 1, "float32", "sdpa", None, CASES)
    settings: dict[str, Any] = {"model": MODEL, "source": None, "job": made, "points": (point,), "clips": (CLIP,)}
    settings |= {"prompt": "a cat", "negative_prompt": "", "image": None, "sharding": "none", "vae_tiling": False}
    settings["layers_timed"] = int(MODEL.transformer["num_layers"])
    return clip_job.ClipJob(**{**settings, "compare_plain": False, **changes})


def measured(folder: Path, during: Callable[[HostWire], None] = lambda wire: None, **changes: Any) -> dict[str, Any]:
    """Records by method of steps of one rank of four, over peers that are memory."""
    if dist.is_initialized():
        pytest.skip("a process group of another test file is open: run this file by itself")
    ticks: list[str] = []
    with ghost_on_host(RANKS) as wire:
        during(wire)
        group = dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        rank = Rank(0, RANKS, torch.device("cpu"), group, processes=1)
        steps.measure_steps(rank, job(folder, **changes), ticks.append)
    assert len(ticks) == len(CASES) * (1 + ROUNDS)
    return {r["method"]: r for r in RecordFile(folder / "records.jsonl").read()}


def test_a_ghost_s_steps_are_right_and_composed(tmp_path):
    found = measured(tmp_path, layers_timed=1)
    assert set(found) == {case.method for case in CASES}
    for method, r in found.items():
        assert r["ok"], r["error"]
        assert r["latents_equal"] == (method != "ring")
        assert r["wrong_bytes"] == 0
        assert r["composed"]
        assert (r["n"], r["steps_timed"], r["layers_timed"], r["layers"]) == (ROUNDS, ROUNDS, 1, 2)
        assert (r["experts_timed"], r["experts"], r["forwards_a_step"], r["frames_equal"]) == (1, 2, 2, None)
        assert sum(r[f"{part}_ms"] for part in breakdown.PARTS) == pytest.approx(r["latency_ms"])
        # The clip is its steps, and its ends, which no round changes.
        ends_ms = r["text_encoder_ms"] + r["vae_encode_ms"] + r["vae_decode_ms"]
        composed = [r["steps"] * step_ms + ends_ms for step_ms in r["step_times_ms"]]
        assert r["times_ms"] == pytest.approx(composed)
        assert min(r["text_encoder_ms"], r["vae_decode_ms"], r["host_ms"]) > 0
        assert 0 < r["comm_ratio"] < 1
    assert 0 < found["ulysses"]["layer_comm_ratio"] < 1
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(lines) == len(CASES) * ROUNDS
    assert {line["layers_timed"] for line in lines} == {1}


def test_what_does_not_leave_fails_every_method_that_sends(tmp_path):
    def lose(wire: HostWire) -> None:
        wire._out = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]

    for r in measured(tmp_path, lose).values():
        assert not r["ok"]
        assert "of the bytes that left were not what should have" in r["error"]


def test_what_arrives_wrong_fails_whom_it_reaches(tmp_path, monkeypatch):
    call = SequenceParallelAttention.__call__

    def off(self: SequenceParallelAttention, *qkv: torch.Tensor) -> torch.Tensor:
        out = call(self, *qkv)
        return out * 1.001 if self.method == "hcms" and not self.record_timeline else out  # in timed calls alone

    monkeypatch.setattr(SequenceParallelAttention, "__call__", off)
    found = measured(tmp_path)
    assert "away from ulysses" in found["hcms"]["error"]
    assert all(r["ok"] for method, r in found.items() if method != "hcms")


def test_each_step_follows_the_last_and_a_new_clip_the_last_step():
    seen: list[dict[str, Any]] = []

    def expert(**inputs: Any) -> tuple[torch.Tensor]:
        seen.append(inputs)
        return (inputs["hidden_states"] * 0.5,)

    made = denoising.Denoising(MODEL, CLIP, expert, torch.device("cpu"), 0)
    watch = breakdown.Breakdown(torch.device("cpu"))
    moment, latents = made.first(), []
    for _ in range(3):
        again = moment.again()
        after = made.step(moment, watch)
        assert torch.equal(made.step(again, watch), after)
        latents.append(moment.latents)
        moment = made.next(moment, after)
    first, second, third = (call["timestep"] for call in seen[::4])
    assert first == third > second
    assert not torch.equal(latents[0], latents[2]), "a new clip's noise"
    prompts = [call["encoder_hidden_states"] for call in seen[::2]]
    assert all(torch.equal(a, b) for a, b in zip(prompts[::2], prompts[1::2], strict=True)), "the same when made again"
    assert not torch.equal(prompts[0], prompts[2])
    assert not torch.equal(seen[0]["encoder_hidden_states"], seen[1]["encoder_hidden_states"]), "negative prompt"


def test_parts_of_some_blocks_stand_for_all():
    watch = breakdown.Breakdown(torch.device("cpu"))
    spans = {"transformer": 10, "block": 8, "layer": 4, "core": 3, "cross_attention": 1, "feed_forward": 2}
    watch._spans = [(name, 0, 0.0, ms / 1e3) for name, ms in {**spans, "scheduler": 1}.items()]
    watch._total_ms = 11.5
    few, all_of = watch.parts(), watch.parts(blocks=3)
    assert sum(few.values()) == pytest.approx(11.5)
    assert sum(all_of.values()) == pytest.approx(11.5 + 2 * 8)
    for name in ("self_attention", "self_projections", "cross_attention", "feed_forward"):
        assert all_of[name] == pytest.approx(3 * few[name])
    assert few["transformer_rest"] == pytest.approx(2 + 1)
    assert all_of["transformer_rest"] == pytest.approx(2 + 3 * 1), "what is outside of blocks counts once"
    assert all_of["scheduler"] == few["scheduler"]
    assert all_of["other"] == pytest.approx(few["other"])


def test_the_experiment_times_steps_resumes_and_draws(tmp_path):
    """From the command to the figure, on two ranks over an emulated link, beside the unchanged transformer."""
    line = ("+exp=fig7", "device=cpu", "ranks=2", "timed=steps", "layers_timed=1", "frames=[9]", "height=32",
            "width=48", "link.gbps=1", "bench.iterations=2", "methods=[ulysses,hcms]",
            "wandb.mode=disabled")  # fmt: skip
    done = tiny_run.command(tmp_path, str(tiny_run.EXPERIMENTS / "run.py"), *line)
    assert done.returncode == 0, done.stderr
    assert "composed of 2 timed steps a method, with 1 of 2 layers" in done.stdout
    folder = (tmp_path / "outputs" / "fig7" / "latest").resolve()
    found = RecordFile(folder / "records.jsonl").read()
    assert [r["method"] for r in found] == ["ulysses", "hcms"]
    for r in found:
        assert r["ok"]
        assert r["composed"]
        assert r["bitwise_equal"]
        assert r["plain_bitwise_equal"]
    assert (folder / "fig7.png").is_file()
    again = tiny_run.command(tmp_path, str(tiny_run.EXPERIMENTS / "run.py"), *line, f"resume={folder}")
    assert again.returncode == 0, again.stderr
    assert len(RecordFile(folder / "records.jsonl").read()) == 2
    assert len((folder / "steps.jsonl").read_text().splitlines()) == 2 * 2


def test_composed_clips_are_called_so(tmp_path, monkeypatch):
    """In the figure, in a column of the table of their own, and where claims are judged."""
    from hcms_lab.ground import load
    from hcms_lab.report import judge_clips, table4
    from hcms_lab.report.claims import claims
    from hcms_lab.report.fig7 import fig7
    from test_wan import clip_records

    whole, put = clip_records(9), clip_records(9)
    for r in put:
        r.composed, r.steps_timed, r.layers_timed = True, 4, 1
    RecordFile(tmp_path / "records.jsonl").append([*whole, *put])
    table = load.records(tmp_path)
    figure = fig7(table)
    assert len(figure.axes) == 2 * 3, "a row of their own, though of one length"
    assert "composed" not in figure.axes[0].get_title("left")
    assert figure.axes[3].get_title("left").endswith("composed")
    assert "clips composed of n = 4 timed steps a method with 1 of 2 layers" in figure.get_suptitle()
    assert "a clip, composed of timed steps, under Ulysses" in str(figure.get_label())
    monkeypatch.setattr(table4, "newest_runs", lambda experiment: [table])
    made = table4.table4(table[:0])
    assert "Composed: no such clip ran whole" in made.attrs["caption"]
    is_put = made["clip, composed"].notna()
    assert list(is_put) == [False] * 3 + [True] * 3
    assert list(made["clip, measured"].notna()) == [not x for x in is_put]
    monkeypatch.setattr(table4, "newest_runs", lambda experiment: [table[:4]])
    assert "clip, composed" not in table4.table4(table[:0]).columns
    read: Any = {"fig7": [table], "table4": []}.get
    evidence = judge_clips.of_clips("speedup_vs_ulysses", "speedup_interval", claims()["C4"], read).evidence
    assert ["composed of steps of 1 of 2 layers" in e.on for e in evidence] == [False, True]
    assert "of fewer than 8 steps" in evidence[1].measured
