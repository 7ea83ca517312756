"""Bad input gets one line that names the option, its value and what would do; status 2; nothing is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.t0

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


class Accepted(Exception):
    """Every check was passed: ranks would start now."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """experiments/run.py, in an empty folder, stopped where it would start."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what needs a GPU says so on GPU machines too
    import run

    def start() -> None:
        raise Accepted

    monkeypatch.setattr(run, "hydra_run", start)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    return run


Refused = Callable[[str], str]


@pytest.fixture
def refused(run: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Runs a command line that must be refused; returns its one line."""

    def refuse(line: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as status:
            run.main(line.split())
        assert status.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert sorted(tmp_path.rglob("*")) == before
        return err.rstrip("\n")

    return refuse


# A setting, what its line must name besides the setting itself, and what would do.
SETTINGS = [
    # heads and cuts
    ("ranks=3", "ranks=3", r"10 heads cannot be divided among 3 ranks; give one of \[1, 2, 5, 10\]"),
    ("workload.heads=7", "ranks=2", r"7 heads cannot be divided among 2 ranks; give one of \[1, 7\]"),
    ("cuts=[even:6]", "cuts=even:6", "6 chunks cannot be cut from 5 heads a rank: choose 1 to 5 chunks"),
    ("cuts=[1-1-1-1-1-1]", "cuts=1-1-1-1-1-1", "6 chunks, but a rank has only 5 heads"),
    ("methods=[hcms@even:9]", "cuts=even:9", "choose 1 to 5 chunks"),
    ("cuts=[even:0]", "cuts=even:0", "choose 1 to 5 chunks"),
    ("cuts=[1-3]", "cuts=1-3", "adds up to 4 heads, but a rank has 5"),
    ("cuts=[0-5]", "cuts=0-5", "a chunk without heads"),
    ("cuts=[five]", "cuts=five", "not of the form '1-3-1', 'even:2' or 'tapered:3'"),
    ("cuts=[]", r"cuts=\[\]", r"give cuts=\[even:2\]"),
    ("methods=[ulysses@even:2]", "methods=ulysses@even:2", r"takes no cut; give methods=\[ulysses\]"),
    # the sequence
    ("workload.tokens_per_frame=7 frames=9", "frames=9", "63 tokens cannot be divided among 2 ranks; 62 or 64"),
    # unknown names
    ("methods=[hmcs]", "methods=hmcs", "choose one of ulysses, .*hcms-3lane, ring, ceiling"),
    ("methods=[peer:nobody]", "methods=peer:nobody", "choose one of .*peer:deepspeed-ulysses"),
    ("kernels=[fa4]", "kernels=fa4", "choose one of sdpa, .*sage"),
    ("workload=wan1080p", "workload=wan1080p", "choose one of wan720p, wan_scaled"),
    ("bench.iteration=3", "bench.iteration", "no such setting; bench.iterations is the nearest"),
    ("worklod=wan720p", "worklod", "no such setting; workload is the nearest"),
    ("+cut=[even:2]", "cut", "no such setting; cuts is the nearest"),
    ("+workload.head=3", "workload.head", "no such setting; workload.heads is the nearest"),
    ("xyzzy=3", "xyzzy", "no such setting; --cfg job shows"),
    ("first=last", "first=last", "choose one of exchange, return"),
    ("device=tpu", "device=tpu", "choose auto, cpu or cuda"),
    ("link.kind=wifi", "link.kind=wifi", "choose auto, emulated or native"),
    ("link.ratio_at=shortest", "link.ratio_at=shortest", "choose longest, each"),
    ("workload.dtype=float8", "workload.dtype=float8", "choose one of float32, bfloat16, float16"),
    ("wandb.mode=on", "wandb.mode=on", "choose one of offline, online, disabled"),
    ("kind=nothing", "kind=nothing", "no script in experiments/"),
    ("kind=json", "kind=json", "no script in experiments/"),
    # kernels
    ("kernels=[sdpa-cudnn]", "kernels=sdpa-cudnn", "runs on cuda only, not on cpu"),
    # the link
    *((f"link.ratio={x}", f"link.ratio={x}", "between 0 and 1") for x in ("0", "1", "-0.25", "1.5", "nan", "high")),
    ("link.ratio=[0.1,25]", "link.ratio=25", "between 0 and 1"),
    ("link.ratio=[]", r"link.ratio=\[\]", "at least one ratio"),
    *((f"link.gbps={x}", f"link.gbps={x}", "above 0") for x in ("0.0", "-1.0", "nan", "inf")),
    *((f"link.latency_us={x}", f"link.latency_us={x}", "0 or more") for x in ("-1.0", "nan", "inf")),
    ("ranks=1", "ranks=1", "one rank exchanges nothing.*link.gbps"),
    # counts
    *(
        (f"{name}={x}", f"{name}={x}", "a whole number of at least 1")
        for name in ("ranks", "frames", "prefetch", "bench.iterations", "workload.heads", "workload.head_dim")
        for x in (0, -2)
    ),
    ("workload.batch=0", "workload.batch=0", "a whole number of at least 1"),
    ("workload.tokens_per_frame=-1", "workload.tokens_per_frame=-1", "a whole number of at least 1"),
    ("bench.warmup=0", "bench.warmup=0", "at least 1"),
    ("frames=[9,-11]", "frames=-11", "a whole number of at least 1"),
    ("ranks=2.5", "ranks=2.5", "a whole number of at least 1"),
    ("bench.iterations=many", "bench.iterations=many", "Integer"),
    ("bench.seed=-1", "bench.seed=-1", "from 0 to 2147483647"),
    ("methods=hcms", "methods=hcms", "list"),
    ("methods=[]", r"methods=\[\]", "at least one of ulysses"),
    ("frames=[]", r"frames=\[\]", "at least one"),
    ("kernels=[]", r"kernels=\[\]", "at least one"),
    # files and folders
    ("resume=outputs/none", "resume=outputs/none", "no records.jsonl there; give the folder of an earlier run"),
    ("profile=none.yaml", "profile=none.yaml", r"\+exp=calibrate writes one"),
    ("output=", "output=", "give one that can be made"),
    ("output=/proc/outputs", "output=/proc/outputs", "give one that can be made"),
]


@pytest.mark.parametrize(("setting", "names", "says"), SETTINGS, ids=[s for s, _, _ in SETTINGS])
def test_bad_setting(refused: Refused, setting: str, names: str, says: str) -> None:
    assert re.match(f"error: {names}(: | with ranks=).*{says}", refused(f"+exp=fig3 {setting}"))


@pytest.mark.parametrize("line", ["", "frames=9", "fig3"])
def test_no_experiment(refused: Refused, line: str) -> None:
    assert re.match(r"error: no experiment named: give \+exp=NAME, one of .*fig3, ", refused(line))


def test_unknown_experiment(refused: Refused) -> None:
    assert re.match("error: exp=fig33: choose one of .*fig3, ", refused("+exp=fig33"))
    assert re.match(r"error: exp: write it with a plus, \+exp=NAME", refused("exp=fig3"))


def test_an_output_folder_below_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert "output=taken/here: no folder to write to" in refused("+exp=fig3 output=taken/here")
    assert "output=taken: no folder to write to" in refused("+exp=fig3 output=taken")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_may_not_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir(mode=0o500)
    assert "output=kept: no folder to write to" in refused("+exp=fig3 output=kept")
    assert "output=kept/here: no folder to write to" in refused("+exp=fig3 output=kept/here")


def test_more_ranks_than_gpus(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "device=cuda: no GPU is visible here" in refused("+exp=fig3 device=cuda")
    monkeypatch.setattr("hcms_lab.measure.cases.visible_gpus", lambda: 4)
    assert "ranks=8: only 4 GPUs are visible; give at most that many" in refused("+exp=fig3 device=cuda ranks=8")
    assert "link.kind=emulated: GPUs use their real link" in refused("+exp=fig3 device=cuda link.kind=emulated")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("kernels=[sdpa-flash] workload.dtype=float32", "kernels=sdpa-flash: .* takes float16, bfloat16 on cuda, not"),
        (
            "kernels=[sdpa-cudnn] workload.dtype=bfloat16 workload.head_dim=264",
            "kernels=sdpa-cudnn: .* up to 256 .*264",
        ),
        ("kernels=[sage] workload.dtype=bfloat16 methods=[ring]", "kernels=sage: "),
    ],
)
def test_a_kernel_that_does_not_fit(refused: Refused, monkeypatch: pytest.MonkeyPatch, setting: str, says: str) -> None:
    """As a machine with GPUs checks it; no rank starts, so none is needed."""
    monkeypatch.setattr("hcms_lab.measure.cases.visible_gpus", lambda: 2)
    assert re.search(says, refused(f"+exp=fig3 device=cuda {setting}"))


def test_good_input_is_accepted(run: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(Accepted):
        run.main(["+exp=fig3", "cuts=[1-3-1,even:5,tapered:3,auto]", "frames=9", "ranks=2", "link.ratio=[0.1,lowest]"])
    assert [p.name for p in tmp_path.rglob("*")] == ["outputs"]


def test_exit_status_of_the_command_itself(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "run.py"), "+exp=fig3", "ranks=3", "workload.heads=10"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("error: ranks=3: 10 heads cannot be divided among 3 ranks; give one of [1, 2, 5, 10]\n")
    assert list(tmp_path.iterdir()) == []


def test_with_hydras_own_flags(tmp_path: Path) -> None:
    """A sweep checks each of its jobs in the same way."""
    done = subprocess.run(
        [sys.executable, str(EXPERIMENTS / "run.py"), "--multirun", "+exp=fig3", "ranks=3,7"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: ranks=3: 10 heads cannot be divided among 3 ranks; give one of [1, 2, 5, 10]\n"


def test_a_run_goes_on_only_in_its_own_folder(refused: Refused, tmp_path: Path) -> None:
    committed = Path(__file__).parent.parent / "paper_tables" / "records" / "cpu-intel-xeon-processor-2c" / "fig4"
    elsewhere = shutil.copytree(committed, tmp_path / "of-another-experiment")
    assert "committed records stay as they are" in refused(f"+exp=fig4 resume={committed}")
    assert "that is a run of fig4, not of fig3" in refused(f"+exp=fig3 resume={elsewhere}")
