"""One command line: every command has a line, a help of its own and a target; old paths say where they went."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from time import perf_counter

import pytest

from hcms_lab import commands
from hcms_lab.cli import COMMANDS, main
from hcms_lab.ground.paths import ROOT
from hcms_lab.stepwise import Step, listed, run_steps

pytestmark = pytest.mark.t0

MOVED = ("compare", "contribute", "dashboard")  # paths in experiments/ that the README ever gave


def test_every_command_is_a_module_and_every_module_a_command() -> None:
    modules = {path.stem.replace("_", "-") for path in Path(commands.__path__[0]).glob("[a-z]*.py")}
    assert modules == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_has_a_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: hcms-lab {name}")
    assert f"hcms-lab {name}" in (import_module(f"hcms_lab.commands.{name.replace('-', '_')}").__doc__ or "")
    assert max(map(len, shown.splitlines())) <= 120


def test_the_help_lists_them_all_in_a_line_and_imports_nothing_heavy() -> None:
    code = "import sys; from hcms_lab.cli import main\n"
    code += "try: main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, line in COMMANDS.items():
        assert f"  {name:11} {line}\n" in done.stdout
    assert not {"torch", "pandas", "matplotlib", "hydra", "wandb"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["comparre"], "invalid choice: 'comparre'"),
        (["compare"], "the following arguments are required: runs; hcms-lab compare --help"),
        (["compare", "fig99"], "fig99: neither a folder with records.jsonl nor an experiment that has records"),
        (["compare", "../../etc"], "neither a folder with records.jsonl nor an experiment"),
        (["contribute", "nowhere"], "nowhere is no folder"),
        (["contribute", "--replays", "x"], "unrecognized arguments: --replays"),
        (["reproduce", "--only", "fig99"], "--only fig99: choose of"),
        (["gpu-four", "--minutes", "soon"], "invalid float value: 'soon'"),
        (["gpu-one", "--only", "everything"], "--only everything: choose of"),
        (["readme", "--root", "nowhere"], "is missing"),
        (["dashboard", "entiti=x"], "Options: entity, project, name."),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_it_is_installed_under_its_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["hcms-lab"].partition(":")
    assert getattr(import_module(module), function) is main
    done = subprocess.run([sys.executable, "-m", "hcms_lab", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: hcms-lab COMMAND")


def test_each_has_a_target() -> None:
    targets = (ROOT / "Makefile").read_text()
    assert [name for name in COMMANDS if f"$(LAB) {name}" not in targets] == []


@pytest.mark.parametrize("name", MOVED)
def test_old_paths_say_where_they_went(name: str) -> None:
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "fig3", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: experiments/{name}.py has moved; now: hcms-lab {name} fig3 --out x\n"
    assert name in COMMANDS


def test_steps_that_have_ended_are_not_run_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = [Step("fig6", "here"), Step("table4", "there")]
    settings = ["gpu=l40s", "wandb.mode=disabled"]  # fig6 knows no gpu=, and is refused
    assert run_steps(steps, tmp_path, perf_counter() + 100, settings) == 1
    assert "== fig6, here link" in capfd.readouterr().out
    assert [step.done(tmp_path) for step in steps] == [False, True]
    assert listed(steps, tmp_path).split() == ["to", "do", "here", "fig6", "done", "there", "table4"]
    assert run_steps(steps[1:], tmp_path, perf_counter() + 100, settings) == 0
    assert run_steps(steps, tmp_path, perf_counter(), settings) == 0
    assert capfd.readouterr().out == "out of time: call again for the rest\n"


def test_without_a_gpu_the_cpu_s_experiments_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hcms_lab.commands.reproduce.run", lambda given: print("measured", *given.settings) or 0)
    monkeypatch.setattr("hcms_lab.commands.gpu_one.visible_gpus", lambda: 0)
    assert main(["gpu-one", "bench.iterations=3", "--output", "nowhere"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no GPU is visible here. On one, this would run:\nto do  ghost    fig3\n")
    assert out.endswith("Here, the CPU's experiments:\nmeasured bench.iterations=3\n")


def test_a_reader_that_has_seen_enough() -> None:
    done = subprocess.run(
        f"{sys.executable} -m hcms_lab claims | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("C1  ")
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["-m hcms_lab claims", f"{ROOT}/experiments/run.py +exp=advise gpu=h100"])
def test_a_disk_that_is_full_is_one_line(command: str) -> None:
    shell = f"{sys.executable} {command} > /dev/full"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.parametrize(
    ("how", "encoding", "printed"), [(">&-", "utf-8", ""), ("", "ascii", "rho: ?\n"), ("", "utf-8", "rho: ρ\n")]
)
def test_no_stream_ends_a_run(how: str, encoding: str, printed: str) -> None:
    """One that is closed goes nowhere, in children too, and what an encoding lacks is replaced."""
    code = "from hcms_lab.ground.streams import make_usable as m; m(); import os; print('rho: ρ'); os.system('echo -n')"
    shell = f'"{sys.executable}" -c "{code}" {how}'
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(["sh", "-c", shell], env=env, capture_output=True, check=True)
    assert (done.stdout.decode(), done.stderr) == (printed, b"")
