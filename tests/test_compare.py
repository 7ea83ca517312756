"""What stands in one row, what is kept apart, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from hcms_lab.cli import main
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import environment
from hcms_lab.report.compare import compare, find, load
from made_runs import make_repository, make_run

pytestmark = pytest.mark.t0


def test_second_machine_stands_beside_the_first(tmp_path: Path) -> None:
    make_repository(tmp_path)
    comparison = compare(load(find(["fig3"], tmp_path)))
    assert comparison.labels == ["Cpu One", "Cpu Two"]
    (group,) = comparison.groups
    rows = {row[:4]: row[4:] for row in group.table.itertuples(index=False, name=None)}
    assert rows[2, 3840, "hcms", "1-3-1"] == ("142.22 ms (×1.20)", "156.44 ms (×1.36)")
    alone = rows[2, 3840, "hcms", "2-3"]
    assert alone[0] == "149.33 ms (×1.14)"
    assert pd.isna(alone[1]), "another cut is another row"
    assert any("rows are not from every machine" in note for note in comparison.notes)
    assert comparison.alt().startswith(
        "Speedup of HCMS over Ulysses in fig3 by tokens: Cpu One up to ×1.20; Cpu Two up"
    )
    figure = comparison.figure()
    _, legend = figure.axes[0].get_legend_handles_labels()
    assert {"Cpu One: HCMS 1-3-1", "Cpu Two: HCMS 1-3-1", "Cpu Two: Ring"} <= set(legend)
    plt.close(figure)


def test_many_machines_are_rows(tmp_path: Path) -> None:
    """More than colours tell apart: each names its link and its longest sequence."""
    runs = [make_run(tmp_path, slug=f"cpu-{name}", stamp=name) for name in ("one", "two", "three", "four")]
    figure = compare(load(runs)).figure()
    (panel,) = figure.axes
    names = [tick.get_text() for tick in panel.get_yticklabels()]
    assert names == [f"Cpu {name}: emulated link, 3,840" for name in ("One", "Two", "Three", "Four")]
    assert panel.get_legend_handles_labels()[1] == ["HCMS", "Ring"]
    plt.close(figure)


def test_an_automatic_cut_is_one_row_on_every_machine(tmp_path: Path) -> None:
    runs = load([make_run(tmp_path, stamp="a"), make_run(tmp_path, slug="gpu-x", stamp="b", cuts=("2-3",))])
    for table in runs.values():
        ours = table["method"] == "hcms"
        table.loc[ours, "cut"] = "auto:" + table.loc[ours, "cut"]
    rows = compare(runs).groups[0].table.query("method == 'hcms'")
    assert rows["cut"].tolist() == ["auto", "auto"]
    assert rows.iloc[1]["Cpu Made Up"] == "142.22 ms (×1.20) 1-3-1"
    assert rows.iloc[1]["Gpu X"] == "149.33 ms (×1.14) 2-3"


def test_workloads_are_groups(tmp_path: Path) -> None:
    one = make_run(tmp_path, slug="cpu-one", committed=True)
    two = make_run(tmp_path, slug="gpu-two", committed=True, workload="wan720p", dtype="bfloat16")
    comparison = compare(load([one, two]))
    assert [group.title.split(",")[0] for group in comparison.groups] == ["wan720p", "wan_scaled"]
    assert [list(group.table.columns[4:]) for group in comparison.groups] == [["Gpu Two"], ["Cpu One"]]
    assert sum("no such case from" in note for note in comparison.notes) == 2
    plt.close(comparison.figure())


def test_one_machine_with_two_links_gets_two_labels(tmp_path: Path) -> None:
    one = make_run(tmp_path, stamp="a")
    two = make_run(tmp_path, stamp="b", ratios=(0.4,))
    three = make_run(tmp_path, stamp="c", ratios=(0.4,))
    assert list(load([one, two, three])) == [
        "Cpu Made Up, emulated link, ρ 0.25",
        "Cpu Made Up, emulated link, ρ 0.4, b",
        "Cpu Made Up, emulated link, ρ 0.4, c",
    ]


def test_measured_and_predicted_never_share_a_column(tmp_path: Path) -> None:
    one = make_run(tmp_path, stamp="a")
    two = make_run(tmp_path, slug="gpu-x", stamp="b", source="predicted")
    comparison = compare(load([one, two]))
    assert comparison.labels == ["Cpu Made Up", "Gpu X (predicted)"]
    lines = {line.get_label(): line for line in comparison.figure().axes[0].get_lines()}
    assert lines["Gpu X (predicted): HCMS 1-3-1"].get_linestyle() == ":"
    assert lines["Cpu Made Up: HCMS 1-3-1"].get_linestyle() == "-"
    plt.close("all")


def test_axes_of_the_other_figures(tmp_path: Path) -> None:
    ratios = [make_run(tmp_path, "fig5", slug=s, ratios=(0.1, 0.4), frames=(11,), committed=True) for s in ("a", "b")]
    ranks = [make_run(tmp_path, "fig4", slug=s, ranks=(2, 5), frames=(9,), committed=True) for s in ("a", "b")]
    cuts = [make_run(tmp_path, "fig2", slug=s, cuts=("5", "2-3", "1-3-1"), committed=True) for s in ("a", "b")]
    for folders, label in ((ratios, "communication ratio ρ"), (ranks, "ranks"), (cuts, "chunks a rank")):
        figure = compare(load(folders)).figure()
        assert figure.axes[0].get_xlabel() == label
        plt.close(figure)
    assert "ρ" in compare(load(ratios)).groups[0].table.columns


def test_several_links_in_one_run_are_groups(tmp_path: Path) -> None:
    one = make_run(tmp_path, "fig2", stamp="a", ratios=(0.25, 0.4), cuts=("5", "2-3"))
    two = make_run(tmp_path, "fig2", slug="gpu-x", stamp="b", ratios=(0.4,), cuts=("5", "2-3"))
    comparison = compare(load([one, two]))
    assert [group.title.rpartition(", ")[2] for group in comparison.groups] == ["ρ 0.25", "ρ 0.4"]
    assert list(comparison.groups[1].table.columns[-2:]) == ["Cpu Made Up", "Gpu X"]


def test_refused_cases_are_not_wrong(tmp_path: Path) -> None:
    runs = load([make_run(tmp_path, stamp="a"), make_run(tmp_path, slug="gpu-x", stamp="b")])
    refused = runs["Gpu X"]["seq_len"] == 2160
    runs["Gpu X"].loc[refused, ["status", "latency_ms", "speedup_vs_ulysses"]] = ["refused", None, None]
    assert compare(runs).notes[0] == "6 cases of Gpu X were refused and have no time: left out"


def test_wrong_cases_are_left_out_and_said(tmp_path: Path) -> None:
    runs = load([make_run(tmp_path, stamp="a"), make_run(tmp_path, slug="gpu-x", stamp="b")])
    runs["Gpu X"].loc[runs["Gpu X"]["method"] == "ring", "ok"] = False
    comparison = compare(runs)
    assert "2 cases of Gpu X failed or are wrong: left out" in comparison.notes
    row = comparison.groups[0].table.query("method == 'ring'")
    assert row["Gpu X"].isna().all()


def test_nothing_in_common_is_said_first(tmp_path: Path) -> None:
    one = make_run(tmp_path, slug="cpu-one", committed=True)
    two = make_run(tmp_path, slug="cpu-two", committed=True, frames=(11,))
    assert compare(load([one, two])).notes[0].startswith("no case in common: ")
    three = make_run(tmp_path, slug="cpu-three", committed=True, frames=(9,))
    assert not any("no case in common" in note for note in compare(load([one, three])).notes)


def test_a_reduced_run_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path, slug="cpu-b", stamp="b")
    (folder / "env.json").write_text(json.dumps({**environment(folder), "reduced": "3 of 10 rounds"}))
    notes = compare(load([make_run(tmp_path), folder])).notes
    assert [note for note in notes if "reduced" in note] == ["Cpu B is a reduced run: 3 of 10 rounds"]


def test_refused(tmp_path: Path) -> None:
    one, two = make_run(tmp_path), make_run(tmp_path, "fig5", slug="cpu-b")
    with pytest.raises(UsageError, match="different experiments are not compared: Cpu Made Up is fig3, Cpu B is fig5"):
        compare(load([one, two]))
    with pytest.raises(UsageError, match="nowhere: neither a folder"):
        find(["nowhere"], tmp_path)
    with pytest.raises(UsageError, match="no run to compare"):
        compare({})


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = make_run(tmp_path, stamp="a"), make_run(tmp_path, slug="gpu-x", stamp="b")
    out = tmp_path / "out"
    assert main(["compare", str(one), str(two), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "142.22 ms (×1.20)" in shown
    assert {path.suffix for path in out.iterdir()} == {".md", ".tex", ".csv", ".pdf", ".png"}
    (two / "records.jsonl").write_text((two / "records.jsonl").read_text().replace('"schema": 1', '"schema": 7'))
    assert main(["compare", str(one), str(two), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "schema 7" in line
