"""A run that was killed goes on as itself, and no case is lost or doubled, whenever it was killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest

import tiny
from forks import Command
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import environment as read_environment
from hcms_lab.ground.records import Record, RecordFile, case_of
from hcms_lab.measure.environment import code
from hcms_lab.resume import add_wall, check_resume, facts_of, settings_text, with_segment
from hcms_lab.run import _alone, _link

pytestmark = pytest.mark.t1

LINES = ("latent_frames=[4,3,2,1]", "methods=[ulysses,ulysses-packed,hcms]", "cuts=[even:2]")
# What a time makes of a record; all else is the same however often a run was cut off.
TIMED = re.compile(r".*(_ms|_fraction|_ratio|_gib|_mhz|power_w)|speedup_.*")


@pytest.fixture(scope="module")
def cfg() -> Any:
    sys.path.insert(0, str(tiny.EXPERIMENTS))
    from run import composed

    return composed(["+exp=fig3", *tiny.SETTINGS, *LINES])


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not TIMED.fullmatch(name)}


def measure_in_this_process(cfg: Any, folder: Path, port: int) -> None:
    """The micro-benchmark whole, on one rank that is this process."""
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.path.insert(0, str(tiny.EXPERIMENTS))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    import microbench

    assert microbench.run(cfg, folder)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def killed_after(target: Any, arguments: tuple[Any, ...], after_s: float | None) -> bool:
    """Run a function in a process of its own; whether it was killed before its end."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["hcms_lab.measure.measure", "rich.table", __name__])
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join(timeout=after_s)
    if process.exitcode is None:
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "it failed by itself"
    return process.exitcode != 0


@pytest.mark.timeout(300)
def test_forty_kills_of_a_real_measurement_lose_and_double_nothing(cfg: Any, tmp_path: Path) -> None:
    cfg = replace(cfg, ranks=1)
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    killed_after(measure_in_this_process, (cfg, unbroken, free_port()), None)  # starts the server that forks
    (unbroken / "records.jsonl").unlink()
    began_s = perf_counter()
    assert not killed_after(measure_in_this_process, (cfg, unbroken, free_port()), None)
    takes_s = perf_counter() - began_s
    whole = [untimed(row) for row in RecordFile(unbroken / "records.jsonl").read()]
    assert len(whole) == 12

    draw, kills, runs = random.Random(7), 0, 0
    while kills < 40:
        folder = tmp_path / str(runs)
        folder.mkdir()
        runs += 1
        before: list[dict[str, Any]] = []
        while killed_after(measure_in_this_process, (cfg, folder, free_port()), draw.uniform(0.1, 1.0) * takes_s):
            kills += 1
            found = RecordFile(folder / "records.jsonl").read()
            assert found[: len(before)] == before, "what was measured stays, to the last digit"
            assert max(Counter(map(case_of, found)).values(), default=1) == 1
            done = len(found) - len(found) % 3  # of a point that was cut off, all cases are measured again
            before = found[:done]
        assert [untimed(row) for row in RecordFile(folder / "records.jsonl").read()] == whole


def record(seq_len: int, **values: Any) -> Record:
    return Record(exp="fig3", hardware="here", workload="w", world_size=2, method="hcms", seq_len=seq_len, **values)


def measure_again(path: Path) -> None:
    file = RecordFile(path)
    for seq_len in [row["seq_len"] for row in file.read() if row["status"] == "failed"]:
        file.append([record(seq_len, latency_ms=1.0), record(seq_len + 1000)])


@pytest.mark.timeout(300)
def test_kills_while_records_are_replaced(tmp_path: Path) -> None:
    """At every moment the file holds a case's old record or its new one."""
    draw, kills = random.Random(3), 0
    while kills < 20:
        path = tmp_path / f"{kills}.jsonl"
        RecordFile(path).append([record(n, status="failed", ok=False) for n in range(100)])
        for _ in range(10):
            kills += killed_after(measure_again, (path,), draw.uniform(0.005, 0.1))
            cases = Counter(row["seq_len"] for row in RecordFile(path).read())
            assert set(range(100)) <= set(cases)
            assert max(cases.values()) == 1
        killed_after(measure_again, (path,), None)
        found = RecordFile(path).read()
        assert [row["latency_ms"] for row in found[:100]] == [1.0] * 100
        assert len(found) == len({row["seq_len"] for row in found})


@pytest.mark.timeout(400)
def test_kills_of_the_whole_command(tmp_path: Path) -> None:
    """Everything dies at once, as when a machine goes down; the same command goes on under the run's name."""
    command = [str(tiny.EXPERIMENTS / "run.py"), "+exp=fig3", *tiny.SETTINGS, *LINES]
    runs, draw = tmp_path / "outputs" / "fig3", random.Random(1)
    seen: list[dict[str, Any]] = []
    for segment, lines in enumerate((1, 5), start=1):
        resume = [f"resume={(runs / 'unfinished').relative_to(tmp_path)}"] if (runs / "unfinished").exists() else []
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        process = Command([*command, *resume], tmp_path, environment, own_session=True)
        while process.poll() is None and (segments(runs) < segment or len(records_so_far(runs)) < lines):
            sleep(0.02)
        sleep(draw.uniform(0, 0.2))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = records_so_far(runs)
        assert found[: len(seen)] == seen
        seen = found[: len(found) - len(found) % 3]
    resume = "resume=outputs/fig3/unfinished" if (runs / "unfinished").exists() else "resume=outputs/fig3/latest"
    done = tiny.command(tmp_path, *command, resume)
    assert done.returncode == 0, done.stderr
    found = records_so_far(runs)
    assert [(r["frames"], r["method"]) for r in found] == [
        (frames, method) for frames in (4, 3, 2, 1) for method in ("ulysses", "ulysses-packed", "hcms")
    ]
    assert all(r["ok"] and r["bitwise_equal"] for r in found)
    (folder,) = (path for path in runs.iterdir() if not path.is_symlink())
    assert sorted(path.name for path in runs.iterdir()) == [folder.name, "latest"]
    env = read_environment(folder)
    assert len(env["segments"]) == 3
    assert env["wall_s"] == pytest.approx(sum(segment["wall_s"] for segment in env["segments"]), abs=0.1)


def segments(runs: Path) -> int:
    return sum(len(read_environment(path).get("segments", [0])) for path in runs.glob("2*/env.json"))


def records_so_far(runs: Path) -> list[dict[str, Any]]:
    return [row for path in runs.glob("2*/records.jsonl") for row in RecordFile(path).read()]


@pytest.fixture
def earlier(cfg: Any, tmp_path: Path) -> Path:
    """The folder of a run of these settings, on this machine, with this code."""
    folder = tmp_path / "outputs" / "fig3" / "2026-01-02_03-04-05"
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(settings_text(cfg))
    env = facts_of(cfg)
    (folder / "env.json").write_text(json.dumps(env))
    w = cfg.workload
    layer = {"workload": w.name, "heads": w.heads, "head_dim": w.head_dim, "batch": w.batch, "dtype": w.dtype}
    own = replace(record(960, link=env["link"], seed=cfg.bench.seed), hardware=env["hardware"]["slug"], **layer)
    RecordFile(folder / "records.jsonl").append([own])
    return folder


def test_the_same_settings_go_on(cfg: Any, earlier: Path) -> None:
    check_resume(replace(cfg, resume=str(earlier), output="elsewhere", wandb=replace(cfg.wandb, mode="online")))
    (earlier / "records.jsonl").unlink()
    check_resume(replace(cfg, resume=str(earlier)))  # killed before its first record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"latent_frames": [4, 3]},
            "latent_frames was [4, 3, 2, 1] there and is [4, 3] here; give latent_frames=[4, 3, 2, 1], or start a new",
        ),
        ({"prefetch": 1}, "prefetch was none there and is 1 here"),
        ({"methods": ["ulysses"]}, "methods was"),
        ({"bench": {"seed": 1}}, "bench.seed was 0 there and is 1 here"),
        ({"bench": {"iterations": 5}}, "bench.iterations was 4 there and is 5 here"),
        ({"link": {"latency_us": 1e-9}}, "link.latency_us was 0.0 there and is 1e-09 here"),
        ({"workload": {"batch": 2}}, "workload.batch was 1 there and is 2 here"),
        ({"workload": {"head_dim": 32}}, "workload.head_dim was 16 there and is 32 here"),
    ],
)
def test_other_settings_do_not(cfg: Any, earlier: Path, change: dict[str, Any], message: str) -> None:
    before = {path: path.read_bytes() for path in earlier.iterdir()}
    values = {n: replace(getattr(cfg, n), **v) if isinstance(v, dict) else v for n, v in change.items()}
    with pytest.raises(UsageError) as refusal:
        check_resume(replace(cfg, resume=str(earlier), **values))
    assert f"resume={earlier}: {message}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert {path: path.read_bytes() for path in earlier.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": "f" * 40}, f"commit was {'f' * 40} there and is"),
        ({"code": "123456789abc"}, "code was 123456789abc there and is"),
        ({"python": "3.9.1"}, "python was 3.9.1 there"),
        ({"versions": {"torch": "2.9"}}, "versions.torch was 2.9 there"),
        ({"variables": {"NCCL_P2P_DISABLE": "1"}}, "variables.NCCL_P2P_DISABLE was 1 there and is none here"),
        ({"hardware": {"count": 4}}, "hardware.count was 4 there and is 1 here"),
        ({"hardware": {"slug": "gpu-x"}}, "that run was made on gpu-x, and this is"),
        ({"link": "native"}, "link was native there and is emulated here"),
    ],
)
def test_other_code_or_another_machine_does_not(cfg: Any, earlier: Path, change: dict[str, Any], message: str) -> None:
    env = read_environment(earlier)
    changed = {name: {**env[name], **value} if isinstance(value, dict) else value for name, value in change.items()}
    (earlier / "env.json").write_text(json.dumps({**env, **changed}))
    with pytest.raises(UsageError) as refusal:
        check_resume(replace(cfg, resume=str(earlier)))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "1 of its records are of a case that has one already"),
        ({"exp": "fig4", "seed": 1}, "a record there has exp fig4, not fig3"),
        ({"hardware": "gpu-x", "seed": 1}, "a record there has hardware gpu-x, not"),
        ({"schema": 99, "seed": 1}, "a record there has schema 99, not 1"),
        ({"seed": 77}, "a record there has seed 77, not 0"),
        ({"workload": "other"}, "a record there has workload other, not wan_scaled"),
        ({"heads": 40}, "a record there has heads 40, not"),
        ({"link": "ghost"}, "a record there has link ghost, not emulated"),
        ({"dtype": "bfloat16"}, "a record there has dtype bfloat16, not float32"),
    ],
)
def test_other_records_do_not(cfg: Any, earlier: Path, change: dict[str, Any], message: str) -> None:
    with (earlier / "records.jsonl").open("r+") as file:
        row = json.loads(file.readline())
        file.seek(0, 2)
        file.write(json.dumps({**row, **change}) + "\n")
    with pytest.raises(UsageError, match=message):
        check_resume(replace(cfg, resume=str(earlier)))


def test_a_new_file_of_code_is_other_code(tmp_path: Path) -> None:
    """A module that no commit has may stand in for one that it has; what a run writes is no code."""
    (tmp_path / "src" / "hcms").mkdir(parents=True)
    before = code(tmp_path)
    (tmp_path / "experiments" / "outputs").mkdir(parents=True)
    (tmp_path / "experiments" / "outputs" / "env.json").write_text("{}")
    assert code(tmp_path) == before
    seen = {before}
    for name, text in (("zero.py", "1"), ("zero.py", "2"), ("één.py", "1")):
        (tmp_path / "src" / "hcms" / name).write_text(text)
        seen.add(code(tmp_path))
    assert len(seen) == 4


def test_records_that_nothing_explains_do_not(cfg: Any, earlier: Path) -> None:
    (earlier / "env.json").unlink()
    with pytest.raises(UsageError, match=r"no config\.resolved\.yaml and env\.json there say how it was made"):
        check_resume(replace(cfg, resume=str(earlier)))


def test_one_process_at_a_time(earlier: Path) -> None:
    with _alone(earlier), pytest.raises(UsageError, match="another process is at work there"), _alone(earlier):
        pass
    with _alone(earlier):
        pass


def test_a_link_never_points_to_itself(earlier: Path) -> None:
    latest = earlier.parent / "latest"
    for _ in range(2):
        _link(latest, latest.resolve() if latest.exists() else earlier)
        assert latest.readlink() == Path(earlier.name)
    real = earlier.parent / "real"
    real.mkdir()
    _link(real, real)
    _link(real, earlier)
    assert real.is_dir()
    assert not real.is_symlink()


def test_every_segments_time_counts(earlier: Path) -> None:
    env = {**read_environment(earlier), "started": "2026-01-02T03:04:05+00:00"}
    began_s = 1767323045
    os.utime(earlier / "records.jsonl", (began_s + 60, began_s + 60))  # killed: it could not say how long it ran
    second = with_segment(env, {**env, "started": "2026-01-03T00:00:00+00:00"}, earlier)
    add_wall(second, 10)
    assert (second["wall_s"], [s["wall_s"] for s in second["segments"]]) == (70, [60, 10])
    third = with_segment(second, {**env, "started": "2026-01-04T00:00:00+00:00"}, earlier)
    add_wall(third, 5)
    assert (third["wall_s"], len(third["segments"]), third["started"]) == (75, 3, env["started"])
