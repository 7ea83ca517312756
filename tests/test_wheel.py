"""The library as a wheel, in an environment that has torch: it adds PyYAML alone, and works outside any checkout.

The environment is a new one. Torch and what torch itself requires are linked into it, since they are large; NumPy,
which torch does not require, is not there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

pytestmark = [pytest.mark.t1, pytest.mark.timeout(300), pytest.mark.xdist_group("wheel")]

ROOT = Path(__file__).resolve().parent.parent
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")

ON_TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from hcms import SequenceParallelAttention

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(rank)
q, k, v = torch.randn(3, 1, 64, 6, 32).unbind()
expected = SequenceParallelAttention(method="ulysses")(q, k, v)
plans = {"ulysses-packed": "3", "hcms-serial": "1-2", "hcms-3lane": "2-1", "hcms": "auto"}
for method, plan in (*plans.items(), ("hcms", "1-1-1")):
    assert torch.equal(SequenceParallelAttention(method=method, plan=plan)(q, k, v), expected), (method, plan)
torch.testing.assert_close(SequenceParallelAttention(method="ring")(q, k, v), expected)
dist.destroy_process_group()
print("equal to", list(expected.shape))
"""

ADVICE = """
import sys
from hcms.schedule import catalogue
from hcms.schedule.advice import advise
from hcms.schedule.cost import Workload

found = advise(catalogue.gpu("l40s"), Workload(46_800, 40, 4))
assert "torch" not in sys.modules
print(found.verdict)
"""


def run(*command: str | Path, cwd: Path, fails: bool = False) -> str:
    """What a command prints, errors too, without a trace of this checkout or of pip's settings in its environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**clean, "PIP_CONFIG_FILE": os.devnull, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert bool(done.returncode) == fails, done.stdout
    return done.stdout


def with_needs(name: str) -> dict[str, Distribution]:
    """A distribution and all that it requires here, itself and further on, extras aside."""
    found: dict[str, Distribution] = {}
    wanted = [name]
    while wanted:
        each = wanted.pop()
        if each in found:
            continue
        found[each] = distribution(each)
        for line in found[each].requires or []:
            requirement, _, condition = line.partition(";")
            other = re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]
            if "extra" not in condition and is_here(other):
                wanted.append(other)
    return found


def is_here(name: str) -> bool:
    try:
        return bool(distribution(name))
    except ModuleNotFoundError:  # for another platform or Python than this one
        return False


def linked(dists: dict[str, Distribution], folder: Path) -> None:
    """Their top-level files and folders as links in `folder`."""
    folder.mkdir()
    for dist in dists.values():
        tops = {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(dist.locate_file(top))))


def as_wheel(name: str, folder: Path) -> None:
    """An installed distribution as the wheel that it was."""
    dist = distribution(name)
    about = dist.read_text("WHEEL") or ""
    tags = re.findall(r"^Tag: (\S+)$", about, re.MULTILINE)
    with zipfile.ZipFile(folder / f"{name}-{dist.version}-{tags[0]}.whl", "w") as wheel:
        for file in dist.files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                wheel.write(Path(str(dist.locate_file(file))), str(file))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with torch, into which the wheel was installed from files alone."""
    place = tmp_path_factory.mktemp("wheel")
    source, wheels, env = place / "source", place / "wheels", place / "env"
    source.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", wheels, source, cwd=place)
    as_wheel("pyyaml", wheels)

    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=place)
    python = env / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    linked(with_needs("torch"), place / "torch")
    (site / "torch.pth").write_text(f"{place / 'torch'}\n")
    run(*pip, "--python", python, "install", "--no-index", "--find-links", wheels, "hcms", cwd=place)
    return env


def test_it_adds_pyyaml_and_nothing_else(environment: Path) -> None:
    (site,) = environment.glob("lib/python*/site-packages")
    added = {re.split(r"-\d", folder.name)[0].lower() for folder in site.glob("*.dist-info")}
    assert added == {"hcms", "pyyaml"}
    assert "No module named 'numpy'" in run(environment / "bin/python", "-c", "import numpy", cwd=site, fails=True)


def test_attention_on_two_ranks(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(ON_TWO_RANKS)
    command = [environment / "bin/python", "-W", "ignore", "ranks.py"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=tmp_path,
            env=clean,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [text.splitlines()[-1] for text in told] == ["equal to [1, 64, 6, 32]"] * 2, "\n".join(told)
    assert [rank.returncode for rank in ranks] == [0, 0]


def test_advice(environment: Path, tmp_path: Path) -> None:
    assert run(environment / "bin/python", "-c", ADVICE, cwd=tmp_path) == "use it\n"


def test_every_module_of_the_library_is_there(environment: Path, tmp_path: Path) -> None:
    """All but the drop-in, which stands on diffusers."""
    modules = [
        ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((ROOT / "src" / "hcms").rglob("*.py"))
    ]
    modules = [name for name in modules if not name.startswith("hcms.diffusers")]
    program = f"import importlib\nfor name in {modules}: importlib.import_module(name)"
    run(environment / "bin/python", "-W", "error::ImportWarning", "-c", program, cwd=tmp_path)


def test_the_laboratory_says_what_it_needs(environment: Path, tmp_path: Path) -> None:
    told = run(environment / "bin/python", "-c", "import hcms_lab", cwd=tmp_path, fails=True)
    assert told.splitlines()[-1] == "ImportError: hcms_lab needs numpy, not installed here: pip install hcms[lab]"
