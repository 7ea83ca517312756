"""Which runs may be published, and where they go."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import hardware_name, records
from hcms_lab.report import contribute
from hcms_lab.report.contribute import place, problems
from made_runs import make_run, script

pytestmark = pytest.mark.t0

main = script("contribute").main


def change_env(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    env = json.loads((folder / "env.json").read_text())
    change(env)
    (folder / "env.json").write_text(json.dumps(env))


def change_records(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    change(rows)
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    change_env(folder, lambda env: env.update(started="later"))
    assert json.loads((place(folder, tmp_path, replace=True) / "env.json").read_text())["started"] == "later"
    assert main([str(folder), "--check"]) == 0
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dirty": True}, "differs from its commit"),
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


def test_what_is_missing_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path)
    monkeypatch.setattr(contribute, "MAX_MIB", 0.001)
    assert "MiB is the limit" in problems(folder)[0]
    (folder / "env.json").unlink()
    assert problems(folder) == ["env.json is missing: give the folder of a whole run, such as outputs/fig3/latest"]


def test_command_says_each_reason_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    folder = make_run(tmp_path)
    change_env(folder, lambda env: env.update(dirty=True, commit="abc"))
    capsys.readouterr()
    assert main([str(folder)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("not fit to publish: ") for line in lines)
