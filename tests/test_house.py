"""The house: arrows that go one way, files of a readable length, references that lead somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.t0

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [p for place in ("src", "experiments", "tests", "examples") for p in (ROOT / place).rglob("*.py")]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"

# A line that would be wrong there, and the contract that says so.
AGAINST = [
    ("hcms/hardware.py", "import hcms_lab.ground.paths", "The library knows nothing of the laboratory"),
    ("hcms/schedule/cut.py", "import hcms.kernels", "In the library: front doors"),
    ("hcms/links/__init__.py", "import hcms.attention", "In the library: front doors"),
    ("hcms/schedule/cut.py", "import torch", "Schedules, plans and prices need no torch"),
    ("hcms/kernels.py", "import numpy", "The library needs torch and PyYAML, nothing else"),
    ("hcms_lab/report/style.py", "import hcms_lab.measure.cases", "Measuring and reporting do not know each other"),
    ("hcms_lab/measure/cases.py", "import hcms_lab.report.style", "Measuring and reporting do not know each other"),
    ("hcms_lab/ground/paths.py", "import hcms_lab.measure.memory", "Measuring and reporting do not know each other"),
    ("hcms_lab/measure/job.py", "import hcms_lab.measure.measure", "No two modules of a package lead to each other"),
    ("hcms/unplaced.py", "", "In the library: front doors"),
]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """What `make lint` says of the arrows of a tree."""
    program = f"import sys; sys.path.insert(0, 'src'); {LINT}"
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=100)


def test_make_lint_holds_the_arrows() -> None:
    pytest.importorskip("importlinter", reason="needs the extra: pip install -e '.[dev]'")
    assert LINT in (ROOT / "Makefile").read_text()
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("file", "line", "contract"), AGAINST)
def test_an_arrow_the_other_way_is_found(tmp_path: Path, file: str, line: str, contract: str) -> None:
    pytest.importorskip("importlinter", reason="needs the extra: pip install -e '.[dev]'")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "src" / file).open("a") as source:
        source.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert re.search(rf"^{contract}.* BROKEN$", done.stdout, re.MULTILINE), done.stdout


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_deviations_that_code_cites_are_described() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    described = {number for page in pages for number in re.findall(r"^\| (\d+) \|", page.read_text(), re.MULTILINE)}
    cited = {number for p in SOURCES for number in re.findall(r"deviation (\d+)", p.read_text())}
    assert cited <= described
