"""Records as DataFrames, which records are refused, and tables and figures as files."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from hcms.methods import METHODS
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import COLUMNS, committed_folders, config, environment, newest, records
from hcms_lab.report import style
from hcms_lab.report.tables import write_table
from made_runs import make_run

pytestmark = pytest.mark.t0


def test_every_column_and_its_type(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    table = records(folder)
    assert set(COLUMNS) <= set(table.columns)
    assert table["latency_ms"].dtype == "float64"
    assert table["peak_mem_gib"].isna().all()
    assert str(table["bitwise_equal"].dtype) == "boolean"
    assert table["cut"].tolist()[:2] == [None, None]
    assert all(isinstance(times, list) for times in table["times_ms"])
    pd.testing.assert_frame_equal(table, records(folder / "records.jsonl"))
    assert environment(folder)["hardware"]["slug"] == "cpu-made-up"
    assert environment(folder / "records.jsonl") == environment(folder)
    assert config(folder)["latent_frames"] == [9, 16]


def test_extra_columns_stay(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps({"schema": 1, "exp": "fig7", "vae_decode_ms": 3.5}) + "\n")
    table = records(file)
    assert table["vae_decode_ms"].tolist() == [3.5]
    assert table["latency_ms"].isna().all()


def test_line_being_written_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    whole = len(records(folder))
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"schema": 1, "exp": "fi')
    assert len(records(folder)) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no record yet"),
        ('{"schema": 1}\n{"schema": 2}\n', r"records.jsonl:2 has record schema 2, but this version reads 1"),
        ('{"exp": "fig3"}\n', "has record schema None"),
        ('{"schema": 1}\nnonsense\n', "records.jsonl:2 is not JSON"),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "records.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        records(tmp_path)


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no records at"):
        records(tmp_path)
    with pytest.raises(UsageError, match=r"no records of fig3 yet: run python experiments/run.py \+exp=fig3"):
        newest("fig3", tmp_path)
    assert committed_folders("fig3", tmp_path) == {}


def test_newest_is_the_local_run_then_the_latest_reference(tmp_path: Path) -> None:
    old = make_run(tmp_path, slug="cpu-a", committed=True)
    new = make_run(tmp_path, slug="cpu-b", committed=True)
    env = environment(new)
    (new / "env.json").write_text(json.dumps({**env, "started": "2026-05-01T00:00:00+00:00"}))
    assert newest("fig3", tmp_path) == new
    assert list(committed_folders("fig3", tmp_path)) == ["cpu-a", "cpu-b"]
    local = make_run(tmp_path)
    assert newest("fig3", tmp_path) == local.resolve()
    assert old.is_dir()


def test_table_in_three_forms(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"claim": ["C6: ρ & gain", "a|b"], "gain": [1.234, None], "tokens": [2160.0, None], "ok": [True, False]}
    )
    markdown, latex, plain = (
        path.read_text() for path in write_table("t", table, caption="10 % of it", folder=tmp_path)
    )
    assert markdown.splitlines()[2].split() == ["|", "C6:", "ρ", "&", "gain", "|", "1.23", "|", "2160", "|", "yes", "|"]
    assert r"a\|b" in markdown
    assert markdown.splitlines()[3].count("–") == 2
    assert markdown.endswith("10 % of it\n")
    assert r"C6: $\rho$ \& gain & 1.23 & 2160 & yes \\" in latex
    assert r"\caption{10 \% of it}" in latex
    assert r"\begin{tabular}{lrrl}" in latex
    assert pd.read_csv(tmp_path / "t.csv")["gain"].tolist()[0] == 1.234
    assert plain.startswith("claim,gain,tokens,ok\n")


def test_figures_are_the_same_bytes_twice_and_carry_their_description(tmp_path: Path) -> None:
    def draw(folder: Path) -> list[bytes]:
        with style.use():
            fig, ax = plt.subplots(figsize=style.size("column"))
            ax.bar([0, 1], [1, 2], color=style.colour("hcms"), **style.PREDICTED)
        return [path.read_bytes() for path in style.save(fig, "f", alt="Two bars.", folder=folder)]

    assert draw(tmp_path / "a") == draw(tmp_path / "b")
    with Image.open(tmp_path / "a" / "f.png") as image:
        assert image.info["Description"] == "Two bars."
        assert image.size == (770, 508), "a column at 220 dots an inch"
    assert b"/Type3" not in (tmp_path / "a" / "f.pdf").read_bytes()


def test_every_method_has_its_own_look() -> None:
    assert len({m.colour for m in METHODS.values()}) == len(METHODS)
    assert len({m.marker for m in METHODS.values()}) == len(METHODS)
    assert style.in_order(["ring", "peer:x", "ulysses", "ring"]) == ["ulysses", "ring", "peer:x"]
    before = dict(plt.rcParams)
    with style.use():
        assert plt.rcParams["font.size"] == 8
    assert dict(plt.rcParams) == before
