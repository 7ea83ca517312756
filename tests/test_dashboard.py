"""The W&B workspace and report as JSON, against a golden file; nothing here needs a key or a network.

After a wanted change: `HCMS_GOLDEN=write python -m pytest tests/test_dashboard.py`, then look at the difference.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from forks import python
from hcms_lab.cli import main
from hcms_lab.ground.experiments import axis
from hcms_lab.report import dashboard
from made_runs import make_repository

pytestmark = pytest.mark.t0

pytest.importorskip("wandb_workspaces", reason="the dashboard extra is not installed")

GOLDEN = Path(__file__).parent / "golden" / "dashboard.json"


def without_ids(value: Any) -> Any:
    """The view without what is random at each build: ids of panels and sets, and keys that hold one."""
    if isinstance(value, dict):
        kept = {key: without_ids(inner) for key, inner in value.items() if key not in ("__id__", "id")}
        return {("run-color-group" if key.startswith("run-color-group") else key): v for key, v in kept.items()}
    return [without_ids(inner) for inner in value] if isinstance(value, list) else value


def dry_run(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["dashboard", "entity=someone", "project=hcms", "--dry-run", "--root", str(root)]) == 0
    return json.loads(capsys.readouterr().out)


def test_golden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    views = without_ids(dry_run(make_repository(tmp_path), capsys))
    if os.environ.get("HCMS_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(views, indent=1, ensure_ascii=False) + "\n")
    assert views == json.loads(GOLDEN.read_text())


def test_every_hardware_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    views = dry_run(make_repository(tmp_path), capsys)
    colours = views["workspace"]["spec"]["section"]["customRunColors"]
    assert sorted("Cpu%20One" in key or "Cpu%20Two" in key for key in colours) == [True, True]
    assert len(set(colours.values())) == 2
    text = "\n".join(block.get("content", "") for block in views["report"]["spec"]["blocks"])
    assert "Cpu One" in text
    assert "Cpu Two" in text
    assert "C1" in text


def test_panels_read_what_the_mirror_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    views = dry_run(make_repository(tmp_path), capsys)
    sections = views["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"].split(":")[0] for section in sections] == ["Figure 3", "Figure 4", "fig5", "fig7"]
    for exp, section in zip(dashboard.PANELS, sections, strict=True):
        for panel in section["panels"]:
            assert panel["config"]["xAxis"] == axis(exp)
            assert panel["config"]["groupBy"] == "hardware.value.name"
    latency = next(p for p in sections[0]["panels"] if p["config"]["chartTitle"] == "Latency of HCMS")
    pattern = re.compile(latency["config"]["metricRegex"])
    assert pattern.match("fig3/best/latency_ms/hcms")
    assert pattern.match("fig3/best/latency_ms/hcms sdpa 4")
    assert not pattern.match("fig3/best/latency_ms/hcms-serial")
    (runs,) = views["workspace"]["spec"]["section"]["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "hardware.value.name"}]
    assert runs["filters"]["filters"][0]["value"] == "measured"


@pytest.mark.parametrize(
    ("arguments", "variables", "reason"),
    [
        (
            ["entity=someone"],
            {},
            "no W&B key: run `wandb login`, or set WANDB_API_KEY; hcms-lab dashboard",
        ),
        (["entity=someone"], {"WANDB_API_KEY": "0" * 40}, "Connection refused"),
        (["entiti=someone"], {}, "Options: entity, project, name."),
    ],
)
def test_refused_in_one_line(tmp_path: Path, arguments: list[str], variables: dict[str, str], reason: str) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environ |= {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = python(["-m", "hcms_lab", "dashboard", *arguments], tmp_path, environ | variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert reason in line
