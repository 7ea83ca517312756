"""T0 and T1. The long run finds what grows and what changes, and its own short version finds neither."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from hcms_lab.ground.soak_samples import SoakSample, read
from hcms_lab.measure.soak import growth

pytestmark = pytest.mark.t1

FLAT = [SoakSample(i / 10, i, rank, 250.0 + i % 3, 0.0, 22, 8, 0) for i in range(60) for rank in range(2)]


def test_what_is_flat_passes() -> None:
    assert growth(FLAT) == []
    warming = [replace(s, rss_mib=s.rss_mib - 100, open_files=10) if s.cycle < 10 else s for s in FLAT]
    assert growth(warming) == [], "the first samples are a warm-up"


@pytest.mark.parametrize(
    ("name", "a_cycle", "said"),
    [
        ("rss_mib", 1.0, "rank 1: rss_mib grew from 270 to 302"),
        ("gpu_mib", 1.0, "rank 1: gpu_mib grew from"),
        ("open_files", 0.1, "rank 1: open_files grew from"),
        ("threads", 0.1, "rank 1: threads grew from"),
        ("wrong", 1.0, "rank 1: 59 outputs were wrong"),
    ],
)
def test_what_grows_is_named(name: str, a_cycle: float, said: str) -> None:
    leaky = [
        replace(s, **{name: type(getattr(s, name))(getattr(s, name) + a_cycle * s.cycle)}) if s.rank == 1 else s
        for s in FLAT
    ]
    (found,) = growth(leaky)
    assert found.startswith(said)


def test_a_short_one(tmp_path: Path) -> None:
    settings = ["+exp=soak", *tiny.SETTINGS, "minutes=0.05", "latent_frames=[1]", "cuts=[even:2]"]
    done = tiny.command(tmp_path, str(tiny.EXPERIMENTS / "run.py"), *settings)
    folder = tmp_path / "outputs" / "soak" / "latest"
    samples = read(folder / "samples.csv")
    assert {s.rank for s in samples} == {0, 1}
    assert samples[-1].cycle > 0
    assert [s.minute for s in samples if s.rank == 0][-1] >= 0.05, "the first rank's clock ends it"
    assert all(s.wrong == 0 and s.rss_mib > 50 and s.open_files > 3 for s in samples)
    assert (folder / "soak.png").stat().st_size > 10_000
    assert f"{samples[-1].cycle + 1} cycles on 2 ranks" in done.stdout
    assert done.returncode == (1 if "grew" in done.stdout else 0), done.stderr


def test_what_cannot_be_soaked_is_refused(tmp_path: Path) -> None:
    for setting, said in (("minutes=0", "above 0"), ("ranks=[2,4]", "give one number")):
        done = tiny.command(tmp_path, str(tiny.EXPERIMENTS / "run.py"), "+exp=soak", *tiny.SETTINGS, setting)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
