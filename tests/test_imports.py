"""Schedules, plans and prices are usable without torch: importing them must not pull it in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0

ROOT = Path(__file__).resolve().parent.parent

REPORT_TORCH = """
import importlib, pkgutil, sys
names = sys.argv[1:]
for name in names:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []) if name != "hcms" else [], name + "."):
        importlib.import_module(found.name)
        names.append(found.name)
print(",".join(sorted(m for m in sys.modules if m.split(".")[0] in ("torch", "hcms", "hcms_lab"))))
"""


def imported(*names: str) -> set[str]:
    """Modules of torch and hcms that a fresh interpreter holds after importing `names` and what lies below them."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT_TORCH, *names], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.strip().split(","))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("hcms",), {"hcms"}),
        (("hcms.schedule",), {"hcms.schedule.schedule", "hcms.schedule.cut", "hcms.schedule.simulate"}),
        (("hcms_lab.ground.config",), {"hcms_lab.ground.config"}),
    ],
)
def test_no_torch(names: tuple[str, ...], expected: set[str]) -> None:
    modules = imported(*names)
    assert expected <= modules
    assert not {m for m in modules if m.split(".")[0] == "torch"}


REFUSED = """
import runpy, sys
sys.argv = ["experiments/run.py", *sys.argv[1:]]
sys.path.insert(0, "experiments")
try:
    runpy.run_path("experiments/run.py", run_name="__main__")
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize("line", ["+exp=fig3 ranks=3 workload.heads=10", "+exp=fig7 guidance=nan"])
def test_what_a_cpu_refuses_waits_for_no_torch(line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, *line.split(), "device=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr.count("\n")) == ("2 False\n", 1), done.stderr
