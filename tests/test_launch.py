"""Ranks start, log and end together, and know their place. What becomes of faults is in test_faults.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tiny
from hcms_lab.ground.errors import UsageError
from hcms_lab.measure.launch import Rank, RankFailed, launch, together

pytestmark = pytest.mark.t1

RUN = tiny.EXPERIMENTS / "run.py"
TINY = ["+exp=fig3", *tiny.SETTINGS, "latent_frames=[2,1]", "methods=[ulysses,hcms]", "cuts=[even:2]"]


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


def test_what_ranks_refuse_under_torchrun(tmp_path: Path) -> None:
    """Said once, by the first of them."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = tiny.command(tmp_path, *torchrun, str(RUN), *TINY, "link.gbps=null", "link.ratio=0.01")
    assert done.returncode == 1
    assert done.stderr.count("error: link.ratio=0.01") == 1, done.stderr
    assert "UsageError" not in done.stderr


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


def one_fails_alone(rank: Rank) -> None:
    """Rank 1 fails where the others go on to an exchange that it never joins."""
    error = None
    try:
        if rank.rank == 1:
            raise ValueError("a kernel that this rank alone has not")
        dist.all_reduce(torch.ones(1))
    except ValueError as caught:
        error = caught
    together(rank, error, left_alone_s=2)


def all_fail_or_one_says_so(rank: Rank, answers: Any) -> None:
    said = [together(rank, None), together(rank, ValueError("no such cut"))]
    said.append(together(rank, ValueError("here alone") if rank.rank == 1 else None))
    if rank.first:
        answers.put(said)


def test_a_rank_that_fails_alone_leaves_nobody_waiting(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 failed:\nTraceback (.|\n)*a kernel that this rank alone has not$"):
        launch(one_fails_alone, 2, device="cpu", link="native", folder=tmp_path)


def test_ranks_that_reach_the_end_of_a_step_hear_of_each_other(tmp_path: Path) -> None:
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    launch(all_fail_or_one_says_so, 2, answers, device="cpu", link="native", folder=tmp_path)
    assert answers.get() == [
        [None, None],
        ["ValueError: no such cut", "ValueError: no such cut"],
        [None, "ValueError: here alone"],
    ]


def leaves_early(rank: Rank) -> None:
    if rank.rank == 1:
        raise SystemExit(0)
    dist.barrier(rank.control)


def test_a_rank_that_leaves_before_the_end_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 failed:\n(.|\n)*SystemExit: 0$"):
        launch(leaves_early, 2, device="cpu", link="native", folder=tmp_path)
