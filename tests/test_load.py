"""Records as DataFrames, which records are refused, and tables and figures as files."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from forks import python
from hcms.methods import METHODS
from hcms_lab.ground.config import AboutConfig, BenchConfig, CasesConfig, LayerConfig, LinkConfig, WorkloadConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import COLUMNS, committed_folders, config, environment, judged_runs, newest, records, reduced
from hcms_lab.ground.paths import inside
from hcms_lab.ground.records import MAX_FILE_BYTES, RecordFile
from hcms_lab.ground.reduced import reductions
from hcms_lab.report import style
from hcms_lab.report.registry import exhibit
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
        ('{"schema": 1}\n[1]\n', "records.jsonl:2 is no record, but a list"),
        (
            '{"schema": 1}\n\n{"schema": 1, "latency_ms": "fast"}\n',
            "records.jsonl:3: latency_ms is 'fast', and should be",
        ),
        ('{"schema": 1, "ok": 1}\n', "records.jsonl:1: ok is '1', and should be a truth value"),
        ('{"schema": 1, "latency_ms": true}\n', "latency_ms is 'True', and should be a number"),
        ('{"schema": 1, "latency_ms": NaN}\n', "records.jsonl:1 is not JSON"),
        ('{"schema": 1, "times_ms": [1, "x"]}\n', "records.jsonl:1: times_ms holds something that is not a number"),
        ('{"schema": 1, "exp": ".."}\n', "records.jsonl:1: exp is '..', and should be a plain name"),
        ('{"schema": 1, "hardware": "a/../../b"}\n', "hardware is 'a/../../b', and should be a plain name"),
        ('{"schema": 1, "seed": ' + "9" * 5000 + "}\n", "records.jsonl:1 is not JSON"),
        ("[" * 100_000 + "\n", "records.jsonl:1 nests too deep"),
        ('{"schema": 1, "run": [1]}\n', "records.jsonl:1: run is .* and should be text or a number"),
        ('{"schema": 1, "num_frames": {"a": 1}}\n', "num_frames is .* and should be text or a number"),
        ('{"schema": 1, "seq_len": 1' + "0" * 400 + "}\n", "seq_len is a larger number than any of ours"),
        ('{"schema": 1, "method": "\\ud800"}\n', "records.jsonl:1: method holds half a character"),
        ('{"schema": 1, "cut": "auto:"}\n', "cut is 'auto:', and should be as 1-3-1"),
        (
            '{"schema": 1, "error": "' + "x" * (1 << 20) + '"}\n',
            "1 has 1.0 MiB, and a record has 1 MiB at most",
        ),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "records.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        records(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(b'{"schema": 1}\n{"schema": 1, "exp": "\xff"}\n')
    with pytest.raises(UsageError, match=r"records.jsonl:2 is not UTF-8 text"):
        records(tmp_path)


def test_a_file_that_no_run_writes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "records.jsonl").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UsageError, match="more than 64 MiB"):
        records(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("env.json", '{"a": 1,\n"b": }\n', "env.json:2 is not JSON"),
        ("env.json", "[]", "env.json holds a list"),
        ("env.json", '{"a": "' + "x" * (1 << 20) + '"}', "more than 1 MiB"),
        ("config.resolved.yaml", "a: 1\nb: [\n", "config.resolved.yaml:3 is not YAML"),
        ("config.resolved.yaml", "a: &a [x, x]\nb: &b [*a, *a]\n", "holds YAML aliases"),
        ("config.resolved.yaml", "!!python/object/apply:os.getcwd []\n", "config.resolved.yaml:1 is not YAML"),
        ("config.resolved.yaml", "text", "holds a str"),
        ("config.resolved.yaml", "a: 2024-99-99\n", "config.resolved.yaml is not YAML"),
        ("config.resolved.yaml", "a: " + "[" * 50_000, "config.resolved.yaml nests too deep"),
        ("env.json", '{"hardware": "x"}', "env.json: hardware is 'x': mend or remove it"),
        ("env.json", '{"started": "2026-13-45T99:00"}', "started is '2026-13-45T99:00', and should be a date"),
        ("env.json", '{"started": 5}', "env.json: started is '5'"),
        ("env.json", '{"wall_s": "abc"}', "env.json: wall_s is 'abc'"),
        ("env.json", '{"segments": "abc"}', "env.json: segments is 'abc'"),
        ("env.json", '{"segments": [1]}', "env.json holds a int"),
    ],
)
def test_what_lies_beside_records_is_data_too(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        (environment if name == "env.json" else config)(tmp_path)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe would never end, and a link leads elsewhere."""
    for name, make in {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda path: path.symlink_to("other")}.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / "records.jsonl")
        with pytest.raises(UsageError, match=r"is no regular file|is a link"):
            RecordFile(tmp_path / name / "records.jsonl").read()
        with pytest.raises(UsageError):
            records(tmp_path / name)


FULL = """
import resource, sys
from pathlib import Path
import matplotlib.pyplot as plt
from hcms_lab.report import style

fig = plt.figure()
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    style.save(fig, "fig", folder=Path(sys.argv[1]))
except OSError as error:
    print(error.errno)
"""


def test_a_disk_that_fills_up_leaves_no_half_figure(tmp_path: Path) -> None:
    """Matplotlib's writers end in an AttributeError of their own there."""
    done = python(["-c", FULL, str(tmp_path)], tmp_path, os.environ)
    assert done.stdout == f"{errno.EFBIG}\n", done.stderr
    assert list(tmp_path.iterdir()) == []


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


def test_a_run_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed_run = make_run(tmp_path, committed=True)
    first, _ = make_run(tmp_path, stamp="2026-01-01_00-00-00"), make_run(tmp_path, stamp="2026-01-02_00-00-00")
    monkeypatch.setenv("HCMS_RUN", str(first.relative_to(tmp_path)))
    assert newest("fig3", tmp_path) == first.resolve()
    with pytest.raises(UsageError, match=r"HCMS_RUN=outputs/fig3/2026-01-01_00-00-00 is a run of fig3, not of fig5"):
        newest("fig5", tmp_path)
    monkeypatch.setenv("HCMS_RUN", "committed")
    assert newest("fig3", tmp_path) == committed_run


def as_reduced(folder: Path) -> Path:
    """What a run says of itself that had fewer rounds than its experiment asks for."""
    (folder / "env.json").write_text(json.dumps({**environment(folder), "reduced": "3 of 10 rounds"}))
    return folder


def test_a_reduced_run_is_drawn_and_judged_nowhere(tmp_path: Path) -> None:
    whole = make_run(tmp_path, committed=True)
    as_reduced(make_run(tmp_path, slug="cpu-made-up-variant", committed=True))
    environ = environment(whole.parent.parent / "cpu-made-up-variant" / "fig3")
    environ["hardware"]["slug"] = "cpu-made-up"
    (whole.parent.parent / "cpu-made-up-variant" / "fig3" / "env.json").write_text(json.dumps(environ))
    short = as_reduced(make_run(tmp_path, frames=(4,)))
    assert (reduced(whole), reduced(short)) == ("", "3 of 10 rounds")
    assert newest("fig3", tmp_path) == short.resolve(), "it is drawn"
    for own in (False, True):
        (judged,) = judged_runs("fig3", tmp_path, own=own)
        assert judged.attrs["folder"] == str(whole)
    make_run(tmp_path, slug="gpu-x", stamp="2027")
    assert [len(judged_runs("fig3", tmp_path, own=own)) for own in (False, True)] == [1, 2]


def test_its_figure_and_table_say_so(tmp_path: Path) -> None:
    for folder, is_told in ((make_run(tmp_path, stamp="a"), False), (as_reduced(make_run(tmp_path, stamp="b")), True)):
        figure = exhibit("fig3").of(folder)
        assert ("reduced run: 3 of 10 rounds" in figure.get_suptitle()) == is_told
        assert ("reduced run" in str(figure.get_label())) == is_told
        plt.close(figure)
        table = exhibit("table2").of(folder)
        assert table.attrs["caption"].startswith("Reduced run: 3 of 10 rounds. ") == is_told


@dataclass
class Layer(LayerConfig, CasesConfig):
    pass


@pytest.mark.parametrize(
    ("change", "less"),
    [
        ({}, []),
        ({"latent_frames": [4]}, ["1 of 4 latent_frames"]),
        ({"latent_frames": [1, 2, 3, 4]}, ["latent_frames up to 4 of 16"]),
        ({"workload": WorkloadConfig("w", 8, 8, 16, 1, "float32")}, ["8 of 16 tokens_per_frame"]),
        ({"cuts": []}, []),
        ({"methods": ["ulysses"], "name": "mine", "output": "elsewhere"}, ["1 of 6 methods"]),
        (
            {"methods": ["ulysses", "hcms@1-1", "hcms@2", "hcms", "ring", "ring"]},
            ["no ulysses-packed, hcms-serial, ceiling"],
        ),
        ({"bench": BenchConfig(iterations=3)}, ["3 of 12 rounds"]),
        ({"bench": BenchConfig(iterations=30)}, []),
        ({"ranks": 2}, ["ranks 2 of each"]),
        ({"link": LinkConfig(ratio=0.4)}, ["1 of 2 ratio"]),
    ],
)
def test_what_a_run_has_less_of(change: dict[str, Any], less: list[str]) -> None:
    workload = WorkloadConfig("w", 16, 4, 16, 1, "float32")
    own = Layer(
        name="fig3",
        kind="k",
        about=AboutConfig("t"),
        workload=workload,
        ranks="each",
        link=LinkConfig(ratio=[0.1, 0.4]),
    )
    assert reductions(replace(own, **change), own) == less


def test_paths_made_of_data_stay_inside(tmp_path: Path) -> None:
    assert inside(tmp_path, "fig3", "x") == tmp_path / "fig3" / "x"
    for name in ("..", "", ".", "/etc", "a/b", "a\\b", "-x", ".hidden", "x" * 101, "a\0", "café"):
        with pytest.raises(UsageError, match="names no folder"):
            inside(tmp_path, name)
    (tmp_path / "out").symlink_to(tmp_path.parent)
    with pytest.raises(UsageError, match="leads out of"):
        inside(tmp_path, "out")


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
