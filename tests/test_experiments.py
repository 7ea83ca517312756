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
from hcms_lab.ground.config import BaseConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.experiments import experiment, experiments
from hcms_lab.ground.load import config, environment
from hcms_lab.ground.records import RecordFile
from hcms_lab.ground.reduced import reductions

pytestmark = pytest.mark.t3

CONF = tiny.EXPERIMENTS.parent / "conf"
NAMES = [e.name for e in experiments()]
OF_LAYERS = [e.name for e in experiments() if e.kind == "microbench"]


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
    assert isinstance(cfg, BaseConfig)
    assert (cfg.name, cfg.kind) == (name, experiment(name).kind)
    assert type(cfg) is run.script(cfg.kind).Settings
    assert run.check(run.script(cfg.kind), cfg, name) is None


@pytest.mark.parametrize("gpus", [1, 4, 8])
@pytest.mark.parametrize("name", OF_LAYERS)
def test_validates_where_there_are_gpus(run: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, gpus: int) -> None:
    """On one GPU an experiment may say that it needs more; it may not break."""
    pretend_gpus(monkeypatch, gpus)
    try:
        cfg = run.composed(run.with_gpus([f"+exp={name}"]))
        run.script(cfg.kind).validate(cfg)
    except UsageError as refusal:
        if gpus > 1 or "2 GPUs or more" not in str(refusal):
            raise
    else:
        assert cfg.workload.name == "wan720p"


@pytest.mark.parametrize("name", OF_LAYERS)
def test_validates_where_ranks_share_a_card(run: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On one card, two ranks unless more are asked for; `on_link` is what the experiment is there, and no less."""
    pretend_gpus(monkeypatch, 1)
    monkeypatch.setattr("hcms_lab.measure.cases.check_one_card", lambda: None)
    cfg = run.composed(run.with_gpus([f"+exp={name}", "link.kind=shared"]))
    grid = run.script(cfg.kind).grid(cfg)
    assert {run.script(cfg.kind).link_of(cfg)} == {"shared"}
    if of_link := cfg.on_link.get("shared", []):
        assert {p.ranks for p in grid} == {2}
        wanted = {entry.partition("=")[0] for entry in of_link}
        assert reductions(cfg, run.composed(run.with_gpus([f"+exp={name}", "link.kind=shared"]))) == []
        assert wanted <= {"latent_frames", "kernels", "methods", "ranks", "workload.dtype"}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun starts no daemon"):
        run.script(cfg.kind).grid(cfg)
    monkeypatch.delenv("RANK")
    with pytest.raises(UsageError, match="8 ranks at most share a card"):
        run.script(cfg.kind).grid(run.composed(run.with_gpus([f"+exp={name}", "link.kind=shared", "ranks=16"])))


@pytest.mark.parametrize(("gpus", "typed"), [(2, []), (2, ["link.kind=auto"]), (2, ["link.kind=native-host"]), (1, [])])
def test_a_run_with_its_own_settings_is_whole(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, gpus: int, typed: list[str]
) -> None:
    """Whether the link was named or found: what the experiment has for it is what it is held against."""
    pretend_gpus(monkeypatch, gpus)
    for name in ("fig1", "fig3", "fig5"):
        cfg = run.composed(run.with_gpus([f"+exp={name}", *typed]))
        own = run.composed(run.with_gpus([f"+exp={name}", f"link.kind={cfg.link.kind}"]))
        assert reductions(cfg, own) == []
        assert ("hcms-zero@tapered:5x2+fill+sms8" in cfg.methods) == (gpus > 1)


def test_the_host_between_cards_is_what_it_says(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run over NVLink is recorded as one through the host's memory."""
    pretend_gpus(monkeypatch, 2)

    def refused(*overrides: str) -> str:
        cfg = run.composed(run.with_gpus(["+exp=fig3", "link.kind=native-host", *overrides]))
        with pytest.raises(UsageError) as caught:
            run.script(cfg.kind).validate(cfg)
        return str(caught.value)

    assert "transport=copy-engine: it goes past NCCL" in refused("transport=copy-engine")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    assert "made by NCCL_P2P_DISABLE=1" in refused()
    monkeypatch.delenv("NCCL_P2P_DISABLE")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "made by NCCL_P2P_DISABLE=1" in refused()


def test_ranks_of_several_hosts(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts of four GPUs: eight ranks over the real link, whether or not the command counts them."""
    pretend_gpus(monkeypatch, 4)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for ranks in ([], ["ranks=8"]):
        cfg = run.composed(run.with_gpus(["+exp=fig3", *ranks]))
        assert {(p.ranks, run.script(cfg.kind).link_of(cfg)) for p in run.script(cfg.kind).grid(cfg)} == {(8, "native")}
    pretend_gpus(monkeypatch, 1)
    with pytest.raises(UsageError, match="torchrun started 4 ranks on a host where 1 GPUs are visible"):
        run.script(cfg.kind).validate(cfg)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert run.script(cfg.kind).link_of(cfg) == "native", "a card a host is no card alone"
    run.script(cfg.kind).validate(cfg)


def test_a_job_elsewhere_is_set_up_for_gpus(tmp_path: Path) -> None:
    """`device=cuda` on a host that has none, as one that submits jobs: the full size, with any flag of Hydra's."""
    done = tiny.command(tmp_path, str(tiny.EXPERIMENTS / "run.py"), "--cfg", "job", "+exp=fig3", "device=cuda")
    assert done.returncode == 0, done.stderr
    assert "tokens_per_frame: 3600" in done.stdout
    assert "hcms-zero@auto" in done.stdout
    done = tiny.command(tmp_path, str(tiny.EXPERIMENTS / "run.py"), "--cfg", "job", "+exp=fig3")
    assert "tokens_per_frame: 240" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_and_how_to_run_it(name: str) -> None:
    lines = (CONF / "exp" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1] == f"# {experiment(name).command}"
    assert experiment(name).command.startswith(f"python experiments/run.py +exp={name}")
    assert f"name: {name}" in lines
    assert experiment(name).title[0].isupper()
    assert not any("Budget" in line or "Needs" in line for line in lines), "these are fields"


def test_names_are_those_of_the_files() -> None:
    assert sorted(NAMES) == sorted(path.stem for path in (CONF / "exp").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: fig1\n", "conf/exp/fig1.yaml: its defaults must name one kind"),
        ("defaults: [/kind: wan]\nabout: {title: x, minutes: 3}\n", "'minutes' not in 'AboutConfig'"),
        (
            "defaults: [/kind: wan]\nabout: {title: x, budget_min: much}\n",
            "'much' of type 'str' could not be converted",
        ),
        ("defaults: [/kind: wan]\nabout: {title: x, axis: time}\n", "about.axis=time: choose one of seq_len"),
        ("defaults: [/kind: wan\n", "conf/exp/fig1.yaml: "),
        ("- 3\n", "conf/exp/fig1.yaml: "),
        ("defaults: [/kind: wan]\nname: fig1\n", "title"),
    ],
)
def test_a_file_that_does_not_say_what_it_is(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "conf" / "exp").mkdir(parents=True)
    (tmp_path / "conf" / "exp" / "fig1.yaml").write_text(text)
    with pytest.raises(UsageError) as refused:
        experiment("fig1", tmp_path)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_list(run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == NAMES


def test_help_fits_a_screen_and_names_everything(run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["+exp=fig3", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) <= 60
    words = {word for line in lines for word in line.split()}
    assert {*NAMES, "outputs/NAME/latest,", "ranks=4"} <= words


def test_a_sweep(tmp_path: Path) -> None:
    settings = ("methods=[ulysses]", "bench.iterations=20", "wandb.mode=disabled")
    run = str(tiny.EXPERIMENTS / "run.py")
    done = tiny.command(tmp_path, run, "--multirun", "+exp=machinery", "ranks=2,4", *settings)
    assert done.returncode == 0, done.stderr
    runs = sorted(folder for folder in tmp_path.glob("outputs/machinery/multirun_*/*") if folder.name.isdigit())
    assert [(config(folder)["kind"], config(folder)["ranks"]) for folder in runs] == [
        ("machinery", 2),
        ("machinery", 4),
    ]


def test_committed_runs_read_as_todays(tmp_path: Path) -> None:
    """Records of before layers and clips had names of their own for frames."""
    committed = tiny.EXPERIMENTS.parent / "paper_tables" / "records" / "cpu-intel-xeon-processor-2c"
    assert "\nframes:\n" in (committed / "fig3" / "config.resolved.yaml").read_text()
    assert config(committed / "fig3")["latent_frames"] == [9, 11, 13, 16]
    assert "frames" not in config(committed / "fig3")
    assert config(committed / "fig7").keys() >= {"frames"}


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
    found = _records(tiny.run()[0])
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
    """A crash has cut the last line short: its point is measured again, and the other is left alone."""
    folder, _ = tiny.run()
    file = RecordFile(folder / "records.jsonl")
    before, home = file.read(), folder.parent.parent.parent
    told = {name: (folder / name).read_bytes() for name in ("config.resolved.yaml", ".hydra/overrides.yaml")}
    began_with = environment(folder)
    file.path.write_bytes(file.path.read_bytes()[:-100])
    latest = (folder.parent / "latest").relative_to(home)
    done = tiny.command(home, str(tiny.EXPERIMENTS / "run.py"), *tiny.FIG3, "latent_frames=[3,1]", f"resume={latest}")
    assert done.returncode == 0, done.stderr
    found = file.read()
    assert found[:7] == before[:7]  # to the last digit of every time
    assert [r["frames"] for r in found] == [3] * 7 + [1] * 7
    assert [r["method"] for r in found[7:]] == [r["method"] for r in before[7:]]
    assert found[13]["times_ms"] != before[13]["times_ms"]
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, "latest"]
    assert (folder.parent / "latest").readlink() == Path(folder.name), "and not to itself"
    assert {name: (folder / name).read_bytes() for name in told} == told
    env = environment(folder)
    first, second = env["segments"]
    assert first == began_with
    assert {**env, "segments": 0, "wall_s": 0} == {**began_with, "segments": 0, "wall_s": 0}
    assert second["started"] > first["started"]
    assert env["wall_s"] == pytest.approx(first["wall_s"] + second["wall_s"])


CHEATS = """
import sys
from hcms.attention import SequenceParallelAttention
from hcms.programs.ulysses import UlyssesProgram
from hcms_lab.measure.measure import measure


def on_rank(rank, job, ticks):
    call, finish = SequenceParallelAttention._call, UlyssesProgram.finish
    cheating, last = [], {}

    def cheat(self, layer, q, k, v, out, **options):
        cheating[:] = [self.method]
        timeline = call(self, layer, q, k, v, out, **options)
        if self.method == "hcms-3lane":  # the result of the call before, as a buffer holds that is handed out again
            now = out.clone()
            out.copy_(last.get(id(self), now))
            last[id(self)] = now
        return timeline

    def forgetful(self, op):
        if op.kind == "return" and cheating == ["hcms"] and op.chunk == 1:
            return  # the call ends before its last return has
        if op.kind == "return" and cheating == ["hcms-serial"]:
            self._exchange._chunks[op.chunk].returns[0].slots.recv.mul_(1 + op.chunk)
        finish(self, op)

    SequenceParallelAttention._call, UlyssesProgram.finish = cheat, forgetful
    measure(rank, job, ticks.put)


def main():
    import run
    import microbench

    microbench._on_rank = on_rank
    run.main(sys.argv[1:])
"""


START = """
import sys
sys.path.append({experiments!r})
if __name__ == "__main__":
    import cheats
    cheats.main()
"""


def test_the_benchmark_catches_cheats(tmp_path: Path) -> None:
    """A wrong value, a call that ends before its last return has, and one that gives the result of the call before."""
    (tmp_path / "cheats.py").write_text(CHEATS)
    (tmp_path / "start.py").write_text(START.format(experiments=str(tiny.EXPERIMENTS)))
    done = tiny.command(
        tmp_path,
        str(tmp_path / "start.py"),
        *("+exp=fig3", *tiny.SETTINGS, "latent_frames=1"),
        *("methods=[ulysses,hcms-serial,hcms,hcms-3lane,hcms-zero]", "cuts=[1-1]"),
    )
    assert done.returncode == 1
    assert "error: a case failed or gave a wrong result" in done.stderr
    assert "Traceback" not in done.stderr
    assert "wrong result" in done.stdout
    for record in _records(tmp_path / "outputs" / "fig3" / "latest"):
        honest = record["method"] in ("ulysses", "hcms-zero")
        assert (record["method"], record["ok"], record["bitwise_equal"]) == (record["method"], honest, honest)
        assert honest == (record["latency_ms"] is not None), "a wrong result has no time"
        assert record["status"] == ("done" if honest else "failed")


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
