"""Which runs may be published, and where they go."""

from __future__ import annotations

import getpass
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hcms_lab.cli import main
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import hardware_name, records, reduced
from hcms_lab.report import contribute
from hcms_lab.report.contribute import place, problems
from hcms_lab.report.cut_off import whole_points
from made_runs import make_run

pytestmark = pytest.mark.t0


def change_env(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    env = json.loads((folder / "env.json").read_text())
    change(env)
    (folder / "env.json").write_text(json.dumps(env))


def change_records(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    change(rows)
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_whole_run_is_placed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path)
    (folder / "rank0.log").write_text("logs stay here")
    assert problems(folder) == []
    target = place(folder.parent / "latest", tmp_path)
    assert target == tmp_path / "paper_tables" / "records" / "cpu-made-up" / "fig3"
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert files == {"records.jsonl", "env.json", "config.resolved.yaml", "traces/hcms.json"}
    assert len(records(target)) == len(records(folder))
    with pytest.raises(UsageError, match="is there already: --replace"):
        place(folder, tmp_path)
    change_env(folder, lambda env: env.update(started="2026-11-01T00:00:00+00:00"))
    assert json.loads((place(folder, tmp_path, replace=True) / "env.json").read_text())["started"][:10] == "2026-11-01"
    assert main(["contribute", str(folder), "--check"]) == 0
    assert "fit to publish: 12 records" in capsys.readouterr().out


def test_variant_of_one_machine_has_its_own_place_and_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    place(folder, tmp_path)
    target = place(folder, tmp_path, variant="slow-link")
    assert target.parent.name == "cpu-made-up-slow-link"
    assert hardware_name(target) == "Cpu Made Up (slow-link)"
    assert hardware_name(folder) == "Cpu Made Up"
    with pytest.raises(UsageError, match="--variant a/b"):
        place(folder, tmp_path, variant="a/b")


def test_a_record_twice_and_a_segment_of_other_code_are_problems(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with (folder / "records.jsonl").open("r+") as file:
        line = file.readline()
        file.seek(0, 2)
        file.write(line)
    change_env(folder, lambda env: env.update(segments=[{"dirty": False}, {"dirty": True}]))
    found = " ".join(problems(folder))
    assert "1 records are of a case that has one already" in found
    assert "differs from its commit" in found


def test_a_run_that_is_smaller_is_a_variant(tmp_path: Path) -> None:
    make_run(tmp_path, committed=True, cuts=("1-3-1", "2-3"))
    target = tmp_path / "paper_tables" / "records" / "cpu-made-up" / "fig3"
    before = files_of(target)
    for changes, less in (({}, "12 of 16 cases"), ({"cuts": ("1-3-1", "2-3"), "n": 3}, "3 of 9 rounds")):
        smaller = make_run(tmp_path, stamp=less.replace(" ", "-"), **changes)
        with pytest.raises(UsageError, match=rf"has more \({less}\): --variant NAME"):
            place(smaller, tmp_path, replace=True)
        assert files_of(target) == before
    assert place(smaller, tmp_path, variant="three-rounds").parent.name == "cpu-made-up-three-rounds"

    shutil.rmtree(target)
    change_env(smaller, lambda env: env.update(reduced="3 of 10 rounds"))
    with pytest.raises(UsageError, match=r"a reduced run \(3 of 10 rounds\): --variant NAME"):
        place(smaller, tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("name", ["..", "../..", "/tmp/elsewhere", ".", ""])
def test_names_in_records_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    other = make_run(tmp_path, "fig5", committed=True)
    make_run(tmp_path, committed=True)
    before = files_of(tmp_path / "paper_tables")
    folder = make_run(tmp_path, stamp="planted")
    change_records(folder, lambda rows: rows[0].update(exp=name))
    with pytest.raises(UsageError, match=r"exp is .*, and should be a plain name"):
        place(folder, tmp_path, replace=True)
    folder = make_run(tmp_path, stamp="planted-slug")
    change_env(folder, lambda env: env["hardware"].update(slug=name))
    with pytest.raises(UsageError, match=r"hardware\.slug"):
        place(folder, tmp_path, replace=True)
    with pytest.raises(UsageError, match="--variant"):
        place(make_run(tmp_path, stamp="c"), tmp_path, variant=name, replace=True)
    assert files_of(tmp_path / "paper_tables") == before
    assert other.is_dir()


def test_links_do_not_carry_files_in_or_records_out(tmp_path: Path) -> None:
    secret = tmp_path / "elsewhere.json"
    secret.write_text("{}")
    folder = make_run(tmp_path)
    (folder / "traces" / "more.json").symlink_to(secret)
    assert "traces/more.json is a link: put the file itself there" in problems(folder)
    (folder / "traces" / "more.json").unlink()
    (folder / "traces").rename(tmp_path / "traces")
    (folder / "traces").symlink_to(tmp_path / "traces")
    assert "traces is a link: put the folder itself there" in problems(folder)[0]
    (folder / "traces").unlink()
    (tmp_path / "traces").rename(folder / "traces")
    staged = tmp_path / "paper_tables" / "contributing" / "cpu-made-up-b.fig3.new"
    staged.parent.mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    staged.symlink_to(tmp_path / "victim")
    assert not place(folder, tmp_path, variant="b").is_symlink()
    assert not list((tmp_path / "victim").iterdir())
    (tmp_path / "paper_tables" / "records").mkdir(parents=True, exist_ok=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "paper_tables" / "records" / "cpu-made-up").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="leads out of"):
        place(folder, tmp_path)
    assert not list((tmp_path / "outside").iterdir())
    with pytest.raises(UsageError, match="is among the committed records already"):
        place(make_run(tmp_path, slug="cpu-b", committed=True), tmp_path, replace=True)


def placed_and_killed(folder: Path, root: Path, after_s: float) -> None:
    """`place` in a process of its own, which gets SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            place(folder, root, replace=True)
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_replace_that_is_killed_leaves_the_old_run_or_the_new(tmp_path: Path) -> None:
    target = make_run(tmp_path, committed=True)
    runs = [make_run(tmp_path, stamp="a"), make_run(tmp_path, stamp="b", seed=1)]
    for run in runs:  # enough to copy for a kill to meet
        for i in range(200):
            (run / "traces" / f"{i}.json").write_text(json.dumps({"run": run.name}))
    whole = [files_of(target), *map(files_of, runs)]
    began_s = time.perf_counter()
    place(runs[1], tmp_path, replace=True)
    takes_s = time.perf_counter() - began_s
    draw = random.Random(0)
    for number in range(30):
        placed_and_killed(runs[number % 2], tmp_path, draw.uniform(0.3, 1.1) * takes_s)
        staged = [files_of(path) for path in (tmp_path / "paper_tables").glob("contributing/*.old")]
        assert (files_of(target) if target.exists() else staged[0]) in whole
    place(runs[0], tmp_path, replace=True)
    assert files_of(target) == whole[1]
    assert [path.name for path in (tmp_path / "paper_tables").iterdir()] == ["records"]


def test_what_a_killed_replace_took_away_comes_back(tmp_path: Path) -> None:
    target = make_run(tmp_path, committed=True)
    before, staging = files_of(target), tmp_path / "paper_tables" / "contributing"
    staging.mkdir()
    target.rename(staging / "cpu-made-up.fig3.old")
    place(make_run(tmp_path, slug="cpu-b"), tmp_path)
    assert files_of(target) == before


def drop_ring_once(rows: list[dict[str, Any]]) -> None:
    rows.remove(next(row for row in rows if row["method"] == "ring"))


def drop_length(rows: list[dict[str, Any]]) -> None:
    rows[:] = [row for row in rows if row["frames"] == 9]


def drop_cut(rows: list[dict[str, Any]]) -> None:
    rows[:] = [row for row in rows if not (row["method"] == "hcms" and row["cut"] == "2-3")]


def fail_one(rows: list[dict[str, Any]]) -> None:
    rows[0].update(ok=False, status="failed", error="Traceback\nRuntimeError: no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_ring_once, "incomplete: ring was asked for, and has no record at 2 ranks, 2160 tokens"),
        (drop_length, "incomplete: no record with latent_frames=16"),
        (drop_cut, "incomplete: hcms has no record with the cut 2-3 at 2 ranks, 2160 tokens"),
        (fail_one, "not ok: ulysses  at 2160 tokens: RuntimeError: no"),
        (lambda rows: rows[0].update(exp="fig5"), "records of several experiments in one folder: fig3, fig5"),
        (lambda rows: rows[0].update(hardware="other"), "records of other, but env.json says cpu-made-up"),
        (lambda rows: rows[0].update(schema=3), "has record schema 3"),
    ],
)
def test_records_that_do_not_pass(tmp_path: Path, change: Callable[[list[dict[str, Any]]], None], message: str) -> None:
    folder = make_run(tmp_path, cuts=("1-3-1", "2-3"))
    change_records(folder, change)
    assert message in "\n".join(problems(folder))


def test_a_peer_that_is_wrong_is_a_finding(tmp_path: Path) -> None:
    """It has no time, and its row says why; the run around it is as good as ever."""

    def fail_a_peer(rows: list[dict[str, Any]]) -> None:
        why = {"ok": False, "status": "failed", "error": "wrong result: error 0.05 above the bound 0.0006"}
        rows.append(rows[0] | why | {"method": "peer:toy-ulysses", "cut": None, "latency_ms": None, "times_ms": None})

    folder = make_run(tmp_path)
    change_records(folder, fail_a_peer)
    assert problems(folder) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dirty": True}, "differs from its commit"),
        ({"dirty": None}, "env.json has no dirty"),
        ({"commit": None}, "env.json has no commit"),
        ({"commit": "abc"}, "is not a full commit hash"),
        ({"hardware": {"slug": "a b", "name": "x", "count": 1}}, "hardware.slug 'a b' is not lower-case"),
        ({"hardware": {"slug": "a", "name": "x"}}, "env.json has no hardware.count"),
        ({"versions": None}, "env.json has no versions"),
        (
            {"variables": {"X": "/home/someone/data"}},
            "env.json: variables.X holds the absolute path /home/someone/data",
        ),
        ({"variables": {"X": "a:/opt/tools/nccl"}}, "variables.X holds the absolute path /opt/tools/nccl"),
        ({"variables": {"X": r"C:\Users\me"}}, "holds the absolute path C:"),
        ({"variables": {"X": "f" * 40}}, "40 hexadecimal digits that are not the run's commit"),
        ({"variables": {"X": "hf_" + "a" * 30}}, "holds a Hugging Face token"),
        ({"variables": {"X": "http://me:secret@proxy:80"}}, "holds a password in an address"),
        ({"variables": {"X": "me@example.org"}}, "holds an e-mail address"),
        ({"variables": {"WANDB_API_KEY": "x"}}, "variables.WANDB_API_KEY looks like a secret"),
        ({"hostname": "node7"}, "hostname names a person or a machine"),
        ({"note": "made on Lab-Node-17 by night"}, "holds the host's short name"),
        ({"note": "by jane.doe"}, "holds the user name"),
        ({"note": "correct-horse-battery"}, "holds the value of $SOME_TOKEN"),
    ],
)
def test_environments_that_do_not_pass(
    tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "lab-node-17.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "jane.doe")
    monkeypatch.setenv("SOME_TOKEN", "correct-horse-battery")
    folder = make_run(tmp_path)
    change_env(folder, lambda env: env.update(change))
    assert message in "\n".join(problems(folder))
    with pytest.raises(UsageError):
        place(folder, tmp_path)
    assert not (tmp_path / "paper_tables").exists()


def test_a_copy_that_was_told_its_commit_passes(tmp_path: Path) -> None:
    """It has no history of its own to differ from."""
    folder = make_run(tmp_path)
    change_env(folder, lambda env: env.update(dirty=None, commit_told=True))
    assert problems(folder) == []


def test_what_is_missing_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    monkeypatch.setattr(contribute, "MAX_MIB", 0.001)
    assert "MiB is the limit" in problems(folder)[0]
    (folder / "env.json").unlink()
    assert problems(folder) == ["env.json is missing: give the folder of a whole run, such as outputs/fig3/latest"]


def test_command_says_each_reason_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contribute", str(tmp_path / "nowhere")]) == 2
    folder = make_run(tmp_path)
    change_env(folder, lambda env: env.update(dirty=True, commit="abc"))
    capsys.readouterr()
    assert main(["contribute", str(folder)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("not fit to publish: ") for line in lines)


def test_a_run_that_was_cut_off_gives_its_whole_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path)
    assert main(["contribute", str(folder), "--cut-off"]) == 2
    assert "lacks nothing that it asked for: contribute it without --cut-off" in capsys.readouterr().err
    change_records(folder, drop_length)
    before = files_of(folder)
    assert main(["contribute", str(folder), "--check"]) == 1
    assert "no record with latent_frames=16; go on with resume=<folder>, or give --cut-off" in capsys.readouterr().err
    assert main(["contribute", str(folder), "--check", "--cut-off"]) == 0
    assert "with --variant NAME: cut off with 1 of 2 latent_frames" in capsys.readouterr().out
    target = place(whole_points(folder, tmp_path / "whole"), tmp_path, variant="short")
    assert files_of(folder) == before
    assert set(records(target)["frames"]) == {9}
    assert (reduced(target), problems(target)) == ("cut off with 1 of 2 latent_frames", [])


def test_a_variant_s_name_is_looked_at_by_a_check_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contribute", str(make_run(tmp_path)), "--check", "--variant", "../../x"]) == 2
    assert "--variant ../../x: give lower-case letters" in capsys.readouterr().err
    (tmp_path / "begun").mkdir()
    assert main(["contribute", str(tmp_path / "begun"), "--cut-off"]) == 2
    assert "has no point that is whole yet: go on with resume=<folder>" in capsys.readouterr().err


def test_a_hole_in_a_grid_is_no_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "fig4", ranks=(2, 4), frames=(9, 16))
    change_records(folder, lambda rows: rows.__setitem__(slice(None), [r for r in rows if not last_point(r)]))
    assert main(["contribute", str(folder), "--check"]) == 1
    assert "incomplete: 3 of 4 points of world_size x frames; go on with resume=<folder>" in capsys.readouterr().err
    assert main(["contribute", str(folder), "--check", "--cut-off"]) == 2


def last_point(row: dict[str, Any]) -> bool:
    return (row["world_size"], row["frames"]) == (4, 16)
