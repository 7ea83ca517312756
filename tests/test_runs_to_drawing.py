"""Every experiment, tiny, from its command to its figure or table, which is drawn from that run's own records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

import tiny
from hcms.schedule.profile import load
from hcms_lab.ground.load import records

# One after the other: each has two ranks, and ranks that share cores with other ranks take turns.
pytestmark = [pytest.mark.t3, pytest.mark.xdist_group("drawing"), pytest.mark.timeout(240)]

EXPERIMENTS = sorted((tiny.EXPERIMENTS.parent / "conf" / "exp").glob("*.yaml"))
TEXTS = {path.stem: path.read_text() for path in EXPERIMENTS}

# Five heads a rank, so that an experiment's own cuts fit; a layer that takes some milliseconds.
LAYER = ("workload.heads=10", "workload.head_dim=32", "workload.tokens_per_frame=120", "bench.iterations=3")
ON_TWO_RANKS = ("device=cpu", "ranks=2", "bench.warmup=1", "wandb.mode=disabled")
CLIP = ("frames=[5]", "height=32", "width=48", "link.gbps=1", "bench.iterations=2")
BY_KIND: dict[str, tuple[str, ...]] = {
    "microbench": (*ON_TWO_RANKS, *LAYER),
    "calibrate": (*ON_TWO_RANKS, *LAYER),
    "machinery": ("ranks=2", "cuts=[even:2]", "bench.iterations=50", "wandb.mode=disabled"),
    "soak": (*ON_TWO_RANKS, "minutes=0.1"),
    "wan": (*ON_TWO_RANKS, *CLIP),
    "hardware_types": ("wandb.mode=disabled",),
    "wan_predict": ("gpu=l40s", "ranks=4", "frames=33", "wandb.mode=disabled"),
    "advise": ("gpu=l40s",),
    "claims": (),
}


def set_to(name: str, *settings: str) -> tuple[str, str]:
    """The first of these settings that the experiment's file has, and what it sets it to; two empty words if none."""
    found = (re.search(rf"^ *{setting}: *(.*)$", TEXTS[name], re.MULTILINE) for setting in settings)
    return next(((setting, match[1]) for setting, match in zip(settings, found, strict=True) if match), ("", ""))


def overrides(name: str) -> list[str]:
    """What makes an experiment tiny and leaves it its methods, cuts, kernels and types."""
    (kind,) = re.findall(r"\bkind: (\w+)", TEXTS[name])
    chosen = [f"+exp={name}", *BY_KIND[kind]]
    if kind not in ("microbench", "calibrate"):
        return chosen
    lengths, as_set = set_to(name, "latent_frames", "frames")
    chosen.append(f"{lengths}={'[2,4]' if as_set.startswith('[') else min(4, int(as_set.split()[0]))}")
    if set_to(name, "ratio_at")[1].isdecimal():
        chosen.append("link.ratio_at=4")
    # Where a figure sweeps ratios, two that every host can reach: its own exchange takes much of a short sequence.
    if not set_to(name, "gbps")[1]:
        sweeps = set_to(name, "axis")[1] == "comm_ratio"
        chosen.append("link.ratio=[lowest,0.95]" if sweeps else "link.gbps=0.1")
    return chosen


@pytest.mark.parametrize("name", TEXTS)
def test_an_experiment_runs_to_its_drawing(name: str, tmp_path: Path) -> None:
    done = tiny.command(tmp_path, str(tiny.EXPERIMENTS / "run.py"), *overrides(name))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "outputs" / name / "latest"
    if name in ("advise", "table1"):  # they print, and write nothing
        assert ("use it" if name == "advise" else "C9") in done.stdout
        assert not (tmp_path / "outputs").exists()
    elif name == "calibrate":
        assert load(folder / "profile.yaml").world_size == 2
    elif name == "soak":
        assert {path.name for path in folder.glob("*s*")} >= {"samples.csv", "soak.png"}
    else:
        table = records(folder)
        assert set(table["exp"]) >= {name}
        assert (table["ok"]).all()
        assert set(table["status"]) <= {"done", "failed"}  # failed: a peer that is not installed
    if name.startswith("fig"):
        with Image.open(folder / f"{name}.png") as figure:
            assert min(figure.size) > 400
            assert len(figure.convert("L").getcolors(256) or []) > 10
    elif name.startswith("table") and name != "table1":
        drawn = (folder / f"{name}.md").read_text()
        assert drawn.count("\n|") >= 3
        assert {path.suffix for path in folder.glob(f"{name}.*")} == {".csv", ".md", ".tex"}
