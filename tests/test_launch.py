"""Ranks start, log and end together; one that dies takes the run down in its own words, and leaves no process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from time import time
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

import tiny
from hcms_lab.ground.errors import UsageError
from hcms_lab.measure.launch import Rank, RankFailed, launch

pytestmark = pytest.mark.t1

RUN = tiny.EXPERIMENTS / "run.py"
TINY = ["+exp=fig3", *tiny.SETTINGS, "latent_frames=[2,1]", "methods=[ulysses,hcms]", "cuts=[even:2]"]

# A kind of experiment that is the micro-benchmark, but for what rank 1 does when it comes to the second point.
FAULTY = """
import os
import signal
import time
from pathlib import Path

import microbench
from microbench import validate


def run(cfg, folder):
    microbench._on_rank = on_rank
    return microbench.run(cfg, folder)


def on_rank(rank, job, ticks):
    from hcms_lab.measure import measure

    folder, fault = Path(job.folder), os.environ["FAULT"]
    (folder / f"pid{rank.rank}").write_text(str(os.getpid()))
    if fault == "raises beside a rank that will not end" and rank.first:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    whole = measure.measure_point

    def measure_point(rank, job, point, *rest):
        if point.frames == 1:
            if rank.first and fault == "raises beside a rank that will not end":
                while True:
                    time.sleep(1)
            if not rank.first:
                (folder / "fault").write_text(str(time.time()))
                if fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("a made-up fault")
        return whole(rank, job, point, *rest)

    measure.measure_point = measure_point
    measure.measure(rank, job, ticks.put)
"""


@pytest.mark.parametrize("fault", ["killed", "raises beside a rank that will not end"])
def test_a_rank_that_dies(tmp_path: Path, fault: str) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    done = tiny.command(tmp_path, str(RUN), *TINY, "kind=faulty", FAULT=fault)
    ended_s = time()
    assert done.returncode == 1, done.stderr
    (folder,) = (tmp_path / "outputs" / "fig3").iterdir()  # and no `latest`: that is the newest whole run
    assert ended_s - float((folder / "fault").read_text()) < 15

    if fault == "killed":
        assert "rank 1 died (SIGKILL); its log is" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert done.stderr.count("RuntimeError: a made-up fault") == 1
        assert done.stderr.count("Traceback (most recent call last)") == 1
        assert "rank 1 failed:" in done.stderr
        assert "a made-up fault" in (folder / "rank1.log").read_text()
    last = f"error: the run failed; its log and its records so far are in outputs/fig3/{folder.name}"
    assert done.stderr.splitlines()[-1] == last

    for rank in range(2):
        assert not psutil.pid_exists(int((folder / f"pid{rank}").read_text()))
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [(r["frames"], r["method"], r["status"], r["ok"]) for r in records] == [
        (2, "ulysses", "done", True),
        (2, "hcms", "done", True),
    ]


def test_the_same_command_under_torchrun(tmp_path: Path) -> None:
    """One folder and one set of records, written by the first rank."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = tiny.command(tmp_path, *torchrun, str(RUN), *TINY)
    assert done.returncode == 0, done.stderr
    folders = sorted(p.name for p in (tmp_path / "outputs" / "fig3").iterdir())
    assert len(folders) == 2
    assert folders[1] == "latest"
    records = [json.loads(line) for line in (tmp_path / "outputs/fig3/latest/records.jsonl").read_text().splitlines()]
    assert [(r["frames"], r["method"]) for r in records] == [(f, m) for f in (2, 1) for m in ("ulysses", "hcms")]
    assert all(r["ok"] and r["bitwise_equal"] and r["world_size"] == 2 for r in records)
    assert done.stdout.count("wrote outputs/fig3/") >= 1
    assert len(re.findall(r"wrote outputs/fig3/\S*records.jsonl", done.stdout)) == 1


def what_a_rank_is(rank: Rank, word: str, answers: Any) -> None:
    print(f"{word} from {rank.rank}")
    x = torch.full((1,), float(rank.rank + 1))
    dist.all_reduce(x)
    gathered: list[Any] = [None] * rank.ranks
    facts = (rank.rank, rank.ranks, rank.first, str(rank.device), dist.get_backend(), torch.get_num_threads(), x.item())
    dist.all_gather_object(gathered, facts, group=rank.control)
    if rank.first:
        answers.put(gathered)


def test_ranks_know_their_place(tmp_path: Path) -> None:
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    polls: list[int] = []
    folder = tmp_path / "new" / "folder"
    launch(
        what_a_rank_is, 2, "hello", answers, device="cpu", link="emulated", folder=folder, poll=lambda: polls.append(1)
    )
    assert answers.get() == [(r, 2, r == 0, "cpu", "emulated", 1, 3.0) for r in range(2)]
    assert polls
    assert [(folder / f"rank{r}.log").read_text() for r in range(2)] == ["hello from 0\n", "hello from 1\n"]


def only_ranks_can_tell(rank: Rank) -> None:
    raise UsageError("link.ratio=0.01: too low for this machine; give 0.1")


def fails_at_once(rank: Rank) -> None:
    raise KeyError("rank", rank.rank)


def test_what_ranks_refuse_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^link.ratio=0.01: too low for this machine; give 0.1$"):
        launch(only_ranks_can_tell, 2, device="cpu", link="native", folder=tmp_path)


def test_all_ranks_failing_is_one_failure(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"^rank \d failed:\nTraceback (.|\n)*KeyError: \('rank', \d\)$"):
        launch(fails_at_once, 2, device="cpu", link="native", folder=tmp_path)


def test_torchrun_with_another_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"ranks=2: torchrun started 3 ranks; give ranks=3 or start 2"):
        launch(fails_at_once, 2, device="cpu", link="native", folder=tmp_path)
