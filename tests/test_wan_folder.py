"""A pipeline from a folder, as users have theirs: loaded, run by fig7 from command to figure and by two scripts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny as tiny_run
from forks import Command
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.records import RecordFile
from hcms_lab.measure.wan.random_folder import write_random
from ranks import Place, on_ranks
from tiny_wan import clip, pipeline, tiny

pytestmark = pytest.mark.t1

PARTS = pytest.importorskip("hcms_lab.measure.wan.breakdown").PARTS
ROOT = Path(__file__).resolve().parents[1]
WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "and", "dog", "bake", "cake"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The tiny pipeline as users have theirs: a folder, with a tokenizer of nine words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = pipeline()
    pipe.register_modules(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
    )
    folder = tmp_path_factory.mktemp("wan")
    pipe.save_pretrained(folder)
    return folder


def from_folder(place: Place, folder: Path) -> dict[str, Any]:
    import hcms
    from hcms_lab.measure.wan.build import pretrained_pipeline

    pipe = pretrained_pipeline(tiny(), str(folder), place.device)
    pipe.set_progress_bar_config(disable=True)
    alone = clip(pipe)
    hcms.parallelize(pipe, place.gloo, plan="even:2")
    return {
        "tokenizer": type(pipe.tokenizer).__name__,
        "flow_shift": pipe.scheduler.config.flow_shift,
        "experts": [pipe.transformer is not None, pipe.transformer_2 is not None],
        "equal": torch.equal(clip(pipe), alone),
    }


def test_a_saved_pipeline_loads_and_gives_the_same(saved):
    for found in on_ranks(2, from_folder, saved):
        assert found.pop("tokenizer") != "ByT5Tokenizer"
        assert found == {"flow_shift": 5.0, "experts": [True, True], "equal": True}


def test_the_experiment_records_checks_and_draws(saved, tmp_path):
    """fig7 from its command to its figure, with weights from a folder whose own sizes count."""
    done = tiny_run.command(
        tmp_path,
        str(tiny_run.EXPERIMENTS / "run.py"),
        *("+exp=fig7", "device=cpu", "ranks=2", "weights=pretrained", f"weights_path={saved}", "frames=[9]"),
        *("height=32", "width=48", "link.gbps=1", "bench.iterations=2", "wandb.mode=disabled"),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr
    folder = (tmp_path / "outputs" / "fig7" / "latest").resolve()
    records = RecordFile(folder / "records.jsonl").read()
    assert [(r["num_frames"], r["method"]) for r in records] == [
        (9, method) for method in ("ulysses", "ulysses-packed", "hcms", "ring")
    ]
    for r in records:
        assert r["ok"]
        assert (r["weights"], r["heads"], r["steps"], r["flow_shift"]) == ("pretrained", 8, 2, 5.0)
        assert sum(r[f"{part}_ms"] for part in PARTS) == pytest.approx(r["latency_ms"])
        assert len(r["step_times_ms"]) == r["steps"]
        if r["method"] != "ring":
            assert r["bitwise_equal"]
            assert r["plain_bitwise_equal"]
        assert (folder / "media" / f"video-{r['num_frames']}.mp4").stat().st_size > 500
        assert (folder / "media" / f"still-{r['num_frames']}.png").is_file()
    assert (folder / "fig7.png").is_file()
    clips = (folder / "clips.jsonl").read_text().splitlines()
    assert len(clips) == 4 * 2


def test_two_lines_in_a_script_give_the_same_frames(tmp_path):
    """The user's script before, on one process, and after, under torchrun on two, on a folder that anyone can write."""
    weights = write_random(tmp_path / "wan-tiny")
    before, after = (ROOT / "examples" / name for name in ("wan_plain.py", "wan_two_lines.py"))
    code = [p.read_text().split('"""')[2].splitlines() for p in (before, after)]
    added = [line for line in code[1] if line not in code[0]]
    assert added == ["import hcms", "hcms.parallelize(pipe)"]
    assert [line for line in code[0] if line not in code[1]] == []
    size = ["--frames", "9", "--height", "32", "--width", "48", "--steps", "2", "--weights", str(weights)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    videos, runs = {}, {}
    for name, launcher, script in (("before", [], before), ("after", torchrun, after)):
        line = [*launcher, str(script), *size, "--output", str(tmp_path / f"{name}.mp4")]
        runs[name] = Command(line, tmp_path, environment)
    for name, process in runs.items():
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, (out + err)[-3000:]
        videos[name] = (tmp_path / f"{name}.mp4").read_bytes()
    assert len(videos["before"]) > 1000
    assert videos["after"] == videos["before"]


def test_a_random_folder_is_only_written_where_nothing_is(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="is there already: name a folder that is new or empty"):
        write_random(tmp_path)
    with pytest.raises(UsageError, match=r"unknown model 'wan-tny': choose one of .*wan-tiny"):
        write_random(tmp_path / "new", "wan-tny")
