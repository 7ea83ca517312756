"""One offline W&B run: what the mirror logs, read back from the run's own log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from forks import python
from hcms_lab.ground.config import Config
from hcms_lab.ground.load import environment, records
from hcms_lab.ground.private import words
from hcms_lab.ground.records import RecordFile
from hcms_lab.report.wandb_mirror import Mirror, best, summary
from made_runs import COMMIT, make_run
from wandb_server import wandb_server

pytestmark = pytest.mark.t0


def config(mode: str, exp: str = "fig3") -> Any:
    cfg = OmegaConf.structured(Config)
    cfg.name, cfg.kind, cfg.wandb.mode = exp, "compare_methods", mode
    return cfg


def mirror(folder: Path, mode: str, figures: list[Path]) -> None:
    """What the run loop does: some records, a poll, the rest, the end."""
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("")
    with Mirror(folder, config(mode), environment(folder)) as under_test:
        assert under_test.poll() == 0
        with (folder / "records.jsonl").open("a") as file:
            file.write("".join(lines[:3]) + lines[3][:20])
        polled = under_test.poll()
        with (folder / "records.jsonl").open("a") as file:
            file.write(lines[3][20:] + "".join(lines[4:]))
        assert polled == (0 if mode == "disabled" else 3), "a line that is half written must wait"
        under_test.finish(figures)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The records of the folder's only W&B run, as its own tool prints them."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    shown = subprocess.run([wandb, "leet", "inspect", "--json", run], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in shown.stdout.splitlines()]


def test_offline_run_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, cuts=("1-3-1", "2-3"))
    figure = tmp_path / "fig3.png"
    import matplotlib.figure

    matplotlib.figure.Figure(figsize=(1, 1)).savefig(figure)
    mirror(folder, "offline", [figure])
    assert capfd.readouterr() == ("", ""), "the mirror is silent"

    log = log_of(folder)
    (start,) = [line["run"] for line in log if line["type"] == "run"]
    told = start["config"]["update"]
    assert start["run_group"] == "fig3"
    assert start["job_type"] == "measured"
    assert start["host"] == "cpu-made-up", "the machine's own name stays here"
    assert told["hardware"] == {"name": "Cpu Made Up", "slug": "cpu-made-up", "count": 1, "cores": 2}
    assert (told["link"], told["exp"], told["commit"]) == ("emulated", "fig3", COMMIT)
    assert told["versions"]["torch"] == "2.13.0"

    metrics = [line["metric"] for line in log if line["type"] == "metric"]
    assert {"glob_name": "fig3/*", "step_metric": "seq_len"}.items() <= metrics[-1].items()

    history = [line["history"]["item"] for line in log if line["type"] == "history"]
    table = records(folder)
    row = table[(table.cut == "1-3-1") & (table.method == "hcms") & (table.seq_len == 3840)].iloc[0]
    (logged,) = [h for h in history if h.get("fig3/latency_ms/hcms 1-3-1 sdpa measured") and h["seq_len"] == 3840]
    assert logged["fig3/latency_ms/hcms 1-3-1 sdpa measured"] == pytest.approx(row["latency_ms"])
    assert logged["chunks"] == 3
    cases = [h for h in history if any(key.startswith("fig3/latency_ms/") for key in h)]
    assert len(cases) == len(table)
    curve = {h["seq_len"]: h["fig3/best/speedup_vs_ulysses/hcms"] for h in history if "fig3/best/ok/hcms" in h}
    assert list(curve) == [2160, 3840]
    assert curve[3840] == pytest.approx(row["speedup_vs_ulysses"]), "three chunks beat two"

    final: dict[str, Any] = {}
    for line in log:
        if line["type"] == "summary":
            final |= line["summary"].get("update", {})
    assert final["best_speedup_vs_ulysses"] == pytest.approx(table[table.method == "hcms"].speedup_vs_ulysses.max())
    assert final["best_speedup_vs_ulysses_cut"] == "1-3-1"
    assert final["records.nrows"] == len(table)

    (run,) = (folder / "wandb").glob("offline-run-*")
    (file,) = run.glob("files/media/table/*.json")
    kept = json.loads(file.read_text())
    assert [line[kept["columns"].index("latency_ms")] for line in kept["data"]] == table.latency_ms.tolist()
    artifact = next(
        line["artifact"] for line in log if line["type"] == "artifact" and line["artifact"]["type"] == "records"
    )
    contents = {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    assert set(contents) == {
        "records.jsonl",
        "env.json",
        "settings.yaml",
        "traces/hcms.json",
        "figures/fig3.png",
    }
    assert contents["records.jsonl"].read_text() == (folder / "records.jsonl").read_text()
    assert all(path.is_relative_to(folder) for path in contents.values()), "an upload needs the run's folder only"


def mirror_elsewhere(folder: Path, mode: str, check: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`mirror` in a process of its own, since wandb reads its environment once."""
    code = (
        f"from pathlib import Path; from test_wandb import mirror; mirror(Path({str(folder)!r}), {mode!r}, [])\n{check}"
    )
    environ = {**outside(), **variables}
    done = python(["-c", code], folder, environ)
    assert done.returncode == 0, done.stderr
    return done


def outside() -> dict[str, str]:
    """The environment of a process that knows our modules and none of W&B's settings."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


@pytest.mark.parametrize(("key", "reason"), [("", "no key: run `wandb login`"), ("0" * 40, "Connection refused")])
def test_online_out_of_reach_goes_on_offline(tmp_path: Path, key: str, reason: str) -> None:
    folder = make_run(tmp_path)
    whole = (folder / "records.jsonl").read_text()
    (tmp_path / "home").mkdir()
    done = mirror_elsewhere(
        folder,
        "online",
        HOME=str(tmp_path / "home"),
        WANDB_BASE_URL="http://127.0.0.1:9",  # nobody listens on the discard port
        **({"WANDB_API_KEY": key} if key else {}),
    )
    assert (folder / "records.jsonl").read_text() == whole
    assert any(line["type"] == "exit" for line in log_of(folder))
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("W&B cannot be reached (")
    assert reason in line
    assert "make sync" in line


def test_online_and_sync_reach_a_server(tmp_path: Path) -> None:
    """One run online; another offline, uploaded once by `hcms-lab sync` although that is called twice."""
    reachable = {"HOME": str(tmp_path), "WANDB_API_KEY": "0" * 40}
    online, offline = make_run(tmp_path, stamp="online"), make_run(tmp_path, stamp="offline")

    def sync() -> subprocess.CompletedProcess[str]:
        environ = {**outside(), **reachable, "WANDB_BASE_URL": server.url}
        return python(["-m", "hcms_lab", "sync", str(tmp_path / "outputs")], tmp_path, environ)

    with wandb_server() as server:
        done = mirror_elsewhere(online, "online", WANDB_BASE_URL=server.url, **reachable)
        assert done.stdout == ""
        assert done.stderr.startswith(f"W&B: {server.url}/someone/hcms/runs/")
        assert len(done.stderr.splitlines()) == 1
        assert server.runs[0]["groupName"] == "fig3"
        assert json.loads(server.runs[0]["config"])["hardware"]["value"]["slug"] == "cpu-made-up"
        assert any(a["artifactTypeName"] == "records" for a in server.artifacts)
        assert sum("fig3/best/ok/hcms" in row for row in server.history) == 2
        assert not list(online.glob("wandb/upload-pending"))

        mirror_elsewhere(offline, "offline")
        before = len(server.history)
        first, second = sync(), sync()
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith("uploaded outputs/fig3/offline/wandb/offline-run-")
        assert len(first.stdout.splitlines()) == 1
        assert len(server.history) == 2 * before
        assert second.stdout.startswith("nothing to upload")


EXPERIMENTS = Path(__file__).parent.parent / "experiments"
PLANT = """
import json
import sys
from pathlib import Path
from omegaconf import OmegaConf
from test_wandb import Mirror, environment

sys.path.insert(0, {experiments!r})
from wan import Settings  # of whole clips: they have every path that there is

folder, secret = Path({folder!r}), {secret!r}
cfg = OmegaConf.structured(Settings)
cfg.name, cfg.wandb.mode = "fig7", "online"
cfg.prompt, cfg.negative_prompt = "a cat, key " + secret, "hf_" + "a" * 30
cfg.weights_path, cfg.image, cfg.profile = "/home/jane/weights", "pictures/jane.png", "/home/jane/profile.yaml"
cfg.output, cfg.resume = "/home/jane/outputs", "/home/jane/outputs/fig3/x"
env = environment(folder)
env["variables"] = {{"GLOO_SOCKET_IFNAME": secret, "NCCL_ALGO": "/home/jane/nccl"}}
rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
rows[0].update(ok=False, error="OSError: /home/jane/x of " + secret, workload="hf_" + "a" * 30)
with Mirror(folder, cfg, env) as mirror:
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    mirror.finish()
"""


def test_nothing_private_reaches_wandb(tmp_path: Path) -> None:
    """A key in a variable, in settings, in the environment and in a record; paths, this user and this machine."""
    folder, secret = make_run(tmp_path), "correct-horse-battery-staple"
    variables = {"HOME": str(tmp_path), "WANDB_API_KEY": "0" * 40, "SOME_TOKEN": secret, "LOGNAME": "jane.doe"}
    with wandb_server() as server:
        program = PLANT.format(folder=str(folder), secret=secret, experiments=str(EXPERIMENTS))
        done = python(["-c", program], tmp_path, {**outside(), **variables, "WANDB_BASE_URL": server.url})
        assert done.returncode == 0, done.stderr
    sent = b"\n".join(server.bodies).decode(errors="replace")
    published = folder / "wandb" / "published"
    assert {path.name for path in published.iterdir()} == {"records.jsonl", "env.json", "settings.yaml"}
    texts = [sent, *(path.read_text() for path in published.iterdir())]
    assert "a cat, key <the value of $SOME_TOKEN>" in texts[0], "the settings did arrive"
    assert '"commit"' in sent
    private = [secret, "hf_a", "jane", str(tmp_path), "0" * 40]
    for text in texts:
        assert [name for name in private if name in text] == []
        assert [what for what, pattern in words().items() if pattern.search(text)] == []


def test_predictions_are_called_so(tmp_path: Path) -> None:
    """Through the real command: a run of the catalogue's GPUs is no measurement."""
    clip = ("gpu=l40s", "ranks=4", "frames=33")
    command = [str(EXPERIMENTS / "run.py"), "+exp=table4", *clip, "wandb.mode=offline"]
    done = python(command, tmp_path, outside())
    assert done.returncode == 0, done.stderr
    (start,) = [line["run"] for line in log_of(tmp_path / "outputs" / "table4" / "latest") if line["type"] == "run"]
    assert (start["job_type"], start["config"]["update"]["source"]) == ("predicted", "predicted")
    assert "predicted" in start["tags"]


def test_what_a_resumed_run_measures_again_is_logged_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    file = RecordFile(folder / "records.jsonl")
    rows = file.read()
    with Mirror(folder, config("offline"), environment(folder)) as under_test:
        assert under_test.poll() == 0, "old records wait: they may yet be replaced"
        file.append([{**rows[0], "latency_ms": 1.0}])
        assert under_test.poll() == 1
        assert under_test.poll() == 0
        under_test.finish()
    history = [line["history"]["item"] for line in log_of(folder) if line["type"] == "history"]
    assert sum(any(key.startswith("fig3/latency_ms/") for key in item) for item in history) == len(rows)


def test_sync_without_key_or_network(tmp_path: Path) -> None:
    run = make_run(tmp_path) / "wandb" / "offline-run-1-a"
    older = run.with_name("offline-run-0-a")
    for folder in (run, older):
        folder.mkdir(parents=True)
        (folder / "run-a.wandb").touch()
    environ = {**outside(), "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}

    def sync(*arguments: str, **key: str) -> subprocess.CompletedProcess[str]:
        return python(["-m", "hcms_lab", "sync", *arguments], tmp_path, {**environ, **key})

    dry = sync("--dry-run")
    assert (dry.returncode, dry.stdout) == (0, f"would upload {run.relative_to(tmp_path)}\n")
    for done, reason in ((sync(), "no key"), (sync(WANDB_API_KEY="0" * 40), "Connection refused")):
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert reason in line


def test_disabled_imports_no_wandb(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    mirror_elsewhere(folder, "disabled", check="import sys; assert 'wandb' not in sys.modules")
    assert not (folder / "wandb").exists()


def test_wandb_trouble_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path)
    with Mirror(folder, config("offline"), environment(folder)) as under_test:
        run = under_test._run
        under_test._run = object()  # whatever W&B does wrong
        under_test.poll()
        under_test.finish()
        run.finish()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("W&B could not log (")


def test_best_and_summary_leave_wrong_results_out(tmp_path: Path) -> None:
    table = records(make_run(tmp_path, cuts=("1-3-1", "1-1-1-1-1")))
    wrong = (table.cut == "1-1-1-1-1") & (table.method == "hcms")
    table.loc[wrong, "ok"] = False
    chosen = best(table, "seq_len")
    assert set(chosen[chosen.method == "hcms"].cut) == {"1-3-1"}
    assert summary(table)["failed"] == 2
    assert summary(table)["best_speedup_vs_ulysses_cut"] == "1-3-1"


def test_best_keeps_kernels_and_ranks_apart(tmp_path: Path) -> None:
    table = records(make_run(tmp_path, "fig4", ranks=(2, 4), frames=(16,)))
    chosen = best(table, "world_size")
    assert chosen[chosen.series == "hcms"].world_size.tolist() == [2, 4]
    assert set(best(table, "seq_len").series) >= {"hcms 2", "hcms 4"}
