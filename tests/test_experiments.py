"""Every experiment composes and validates, here and on GPUs; the micro-benchmark runs tiny, resumes, and fails."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import tiny
from hcms_lab.ground.config import Config
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.records import RecordFile

pytestmark = pytest.mark.t3

CONF = tiny.EXPERIMENTS.parent / "conf"
NAMES = sorted(path.stem for path in (CONF / "exp").glob("*.yaml"))


def text_of(name: str) -> str:
    return (CONF / "exp" / f"{name}.yaml").read_text()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(tiny.EXPERIMENTS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    import run

    return run


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """What a machine with so many GPUs would compose and check; no rank starts."""
    for module in ("run", "hcms_lab.measure.cases", "hcms.hardware"):
        monkeypatch.setattr(f"{module}.visible_gpus", lambda: count)


@pytest.mark.parametrize("name", NAMES)
def test_composes_and_validates(run: ModuleType, name: str) -> None:
    cfg = run.composed(run.with_gpus([f"+exp={name}"]))
    assert isinstance(cfg, Config)
    assert cfg.name == name
    assert run.script(cfg).validate(cfg) is None


@pytest.mark.parametrize("gpus", [1, 4, 8])
@pytest.mark.parametrize("name", [name for name in NAMES if "kind: microbench" in text_of(name)])
def test_validates_where_there_are_gpus(run: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, gpus: int) -> None:
    """On one GPU an experiment may say that it needs more; it may not break."""
    pretend_gpus(monkeypatch, gpus)
    try:
        cfg = run.composed(run.with_gpus([f"+exp={name}"]))
        run.script(cfg).validate(cfg)
    except UsageError as refusal:
        if gpus > 1 or "2 GPUs or more" not in str(refusal):
            raise
    else:
        assert cfg.workload.name == "wan720p"


@pytest.mark.parametrize("name", NAMES)
def test_says_how_to_run_it(run: ModuleType, name: str) -> None:
    lines = text_of(name).splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python experiments/run.py +exp={name}")
    assert f"name: {name}" in lines
    assert run.experiments()[name]


def test_list(run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == NAMES


def _records(folder: Path) -> list[dict[str, Any]]:
    return RecordFile(folder / "records.jsonl").read()


def test_a_runs_folder_explains_it() -> None:
    folder, printed = tiny.run()
    assert {".hydra", "config.resolved.yaml", "env.json", "records.jsonl", "rank0.log", "rank1.log", "traces"} <= {
        p.name for p in folder.iterdir()
    }
    assert (folder.parent / "latest").is_symlink()
    assert (folder.parent / "latest").readlink() == Path(folder.name)
    env = json.loads((folder / "env.json").read_text())
    assert env["link"] == "emulated"
    assert env["versions"]["torch"]
    assert f"wrote outputs/fig3/{folder.name}/records.jsonl" in printed
    assert "hcms-serial" in printed  # the table


def test_its_records() -> None:
    found = [r for r in _records(tiny.run()[0]) if r["frames"] != 2]  # which the test below adds
    methods = ["ulysses", "ulysses-packed", "hcms-serial", "hcms", "hcms", "ring", "ceiling"]
    assert [(r["frames"], r["method"]) for r in found] == [(f, m) for f in (3, 1) for m in methods]
    for r in found:
        assert (r["exp"], r["status"], r["ok"], r["error"]) == ("fig3", "done", True, None)
        assert r["bitwise_equal"] == (r["method"] != "ring")
        assert r["seq_len"] == 16 * r["frames"]
        assert (r["link"], r["link_gbps"], r["source"]) == ("emulated", 1.0, "measured")
        assert r["latency_ms"] == pytest.approx(median(r["times_ms"]))
        assert len(r["times_ms"]) == 4
        cut, _, chosen = (r["cut"] or "").partition(":")
        assert (cut, r["method"] in ("hcms", "hcms-serial")) in {("1-1", True), ("auto", True), ("", False)}
        if not chosen:  # an automatic choice may be plain Ulysses
            assert r["actual_path"].endswith("overlapped" if r["method"] in ("hcms", "ring") else "serial")


def test_resume_skips_what_is_done() -> None:
    """A crash has cut the last line short: its point is measured again, a new one too, and the first is left alone."""
    folder, _ = tiny.run()
    file = RecordFile(folder / "records.jsonl")
    before, home = file.read(), folder.parent.parent.parent
    file.path.write_bytes(file.path.read_bytes()[:-100])
    resume = f"resume={folder.relative_to(home)}"
    done = tiny.command(home, str(tiny.EXPERIMENTS / "run.py"), *tiny.FIG3, "frames=[3,2,1]", resume)
    assert done.returncode == 0, done.stderr
    found = file.read()
    assert found[:7] == before[:7]  # to the last digit of every time
    assert [r["frames"] for r in found] == [3] * 7 + [2] * 7 + [1] * 7
    assert [r["method"] for r in found[14:]] == [r["method"] for r in before[7:]]
    assert [p.name for p in folder.parent.iterdir() if p.is_dir() and not p.is_symlink()] == [folder.name]


WRONG = """
import microbench
from microbench import validate


def run(cfg, folder):
    microbench._on_rank = on_rank
    return microbench.run(cfg, folder)


def on_rank(rank, job, ticks):
    from hcms_lab.measure.measure import measure
    from hcms.transport.layout import HeadExchange

    right = HeadExchange.receive_back

    def wrong(self, chunk, *own):
        self._chunks[chunk].returns[0].slots.recv.mul_(1 + chunk)
        right(self, chunk, *own)

    HeadExchange.receive_back = wrong
    measure(rank, job, ticks.put)
"""


def test_a_wrong_result_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    done = tiny.command(
        tmp_path,
        str(tiny.EXPERIMENTS / "run.py"),
        *("+exp=fig3", *tiny.SETTINGS, "kind=wrong", "frames=1", "methods=[ulysses,hcms]", "cuts=[1-1]"),
    )
    assert done.returncode == 1
    assert "error: a case failed or gave a wrong result" in done.stderr
    assert "Traceback" not in done.stderr
    ulysses, hcms = _records(tmp_path / "outputs" / "fig3" / "latest")
    assert ulysses["ok"] is True
    assert (hcms["ok"], hcms["bitwise_equal"], hcms["status"]) == (False, False, "failed")
    assert "wrong result" in done.stdout


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("exp", ["fig2", "fig3", "fig4", "fig5", "table2", "table5"])
def test_the_table_fits_the_terminal(exp: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns go, in a chosen order; no digit does, and no time stands without its check."""
    monkeypatch.syspath_prepend(str(tiny.EXPERIMENTS))
    import microbench

    for folder in sorted((CONF.parent / "paper_tables" / "records").glob(f"*/{exp}")):
        rows = _records(folder)
        printed = io.StringIO()
        console = Console(width=1000, file=printed)
        console.print(microbench.table(rows, f"{exp}: {rows[0]['hardware']}", width))
        text = printed.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        assert "check" in text
        assert all(f"{r['latency_ms']:.2f}" in text for r in rows if r["latency_ms"])
