"""Every figure and table draws from records of the real schema; a measured run ends in its figure; names agree.

What Table 1 makes of records is tested in test_claims.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import tiny
from by_hand import ring_speedup
from hcms.links import links
from hcms.schedule.cost import predict
from hcms.schedule.ideal import IdealCosts
from hcms.schedule.schedule import Op, Schedule, serial, two_lane
from hcms.schedule.timeline import Span, Timeline
from hcms_lab.commands.reproduce import steps
from hcms_lab.ground import traces
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import records
from hcms_lab.ground.paths import ROOT
from hcms_lab.report import fig8, parts, stats
from hcms_lab.report.closed_form import speedup_limit
from hcms_lab.report.notebook import stale
from hcms_lab.report.registry import exhibit, exhibits, register
from made_runs import make_run, script

pytestmark = pytest.mark.t0

CUTS = ("5", "1-1-1-1-1", "2-1-2", "1-3-1", "auto:1-3-1")
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.45)
FIGURES = {name: e.make for name, e in exhibits().items() if e.is_figure}
TABLES = {name: e.make for name, e in exhibits().items() if not e.is_figure}
NUMBERED = sorted(p.stem for p in (ROOT / "conf" / "exp").glob("*.yaml") if re.fullmatch(r"(fig|table)\d+", p.stem))


def records_of(root: Path, exp: str) -> pd.DataFrame:
    """Records such as the experiment gives, every case with a prediction 3 % off."""
    options: dict[str, dict] = {
        "fig1": {"frames": (16,), "cuts": ("1-3-1",)},
        "fig2": {"frames": (9,), "ratios": (0.25, 0.4), "cuts": CUTS[:4]},
        "fig4": {"frames": (9,), "ranks": (2, 4, 8)},
        "fig5": {"frames": (9,), "ratios": RATIOS, "cuts": CUTS},
        "fig8": {"frames": (9,), "ratios": RATIOS, "ranks": (2, 4)},
    }
    folder = make_run(root, exp, **options.get(exp, {}))
    if exp == "fig1":
        costs = IdealCosts(0.25, 2, 128.0)
        for name, schedule in (("ulysses-5", serial((5,), split_qkv=True)), ("hcms-1-3-1", two_lane((1, 3, 1)))):
            predict(schedule, costs).to_chrome_trace(folder / "traces" / f"00-{name}-2x3840-rho0.25.json")
    table = records(folder)
    table["predicted_ms"] = table["latency_ms"] * 1.03
    if exp == "fig4":
        table["ranks_per_core"] = table["world_size"] / 2
    if exp == "fig6":
        hardware_types = script("hardware_types")
        run = script("run")
        cfg = run.composed(["+exp=fig6", f"output={root}"])
        target = root / "fig6"
        target.mkdir()
        hardware_types.run(cfg, target)
        predicted = records(target / "records.jsonl")
        predicted = predicted[predicted["source"] == "predicted"]
        assert predicted["latency_ms"].isna().all(), "a prediction is never a measured time"
        table = pd.concat([table, predicted], ignore_index=True)
    return table


def rows(table: pd.DataFrame, key: str | None = None) -> dict[Any, dict[Any, Any]]:
    """The table's rows by number or by the column `key`."""
    return {row[key] if key is not None else i: row for i, row in enumerate(table.to_dict("records"))}


@pytest.mark.parametrize("exp", sorted(set(FIGURES) - {"fig7"}))
def test_every_figure_draws_and_says_where(exp: str, tmp_path: Path) -> None:
    figure = FIGURES[exp](records_of(tmp_path, exp))
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / f"{exp}.png")
    assert (tmp_path / f"{exp}.png").stat().st_size > 10_000
    title = figure.get_suptitle()
    if exp != "fig6":
        assert "Cpu Made Up" in title
        assert "emulated link" in title
        assert re.search(r"\d ranks", title)
    assert str(figure.get_label()).endswith("."), "a sentence for those who cannot see it"
    plt.close(figure)


@pytest.mark.parametrize("exp", ["fig2", "fig4", "fig5"])
def test_predictions_are_hollow_series_of_their_own_and_their_error_is_shown(exp: str, tmp_path: Path) -> None:
    figure = FIGURES[exp](records_of(tmp_path, exp))
    assert "median prediction error 3.0 % (emulated link, n = " in figure.get_suptitle()
    hollow = [line for ax in figure.axes for line in ax.get_lines() if "simulator" in str(line.get_label())]
    assert hollow
    assert all(line.get_markerfacecolor() == "none" for line in hollow)
    plt.close(figure)


def test_a_run_without_traces_has_no_timeline(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no trace .*ulysses"):
        FIGURES["fig1"](records(make_run(tmp_path, "fig1", frames=(16,))))


TWO_KERNELS = [
    *tiny.SETTINGS,
    *("latent_frames=3", "cuts=[1-1]", "kernels=[sdpa,sdpa-flash]", "link.ratio=0.25", "bench.predict=true"),
]


def test_a_measured_run_ends_in_its_timelines(tmp_path: Path) -> None:
    """From real ranks to the picture: whoever names a trace and whoever finds it agree."""
    done = tiny.command(tmp_path, str(tiny.EXPERIMENTS / "run.py"), "+exp=fig1", *TWO_KERNELS)
    assert done.returncode == 0, done.stderr
    folder = (tmp_path / "outputs" / "fig1" / "latest").resolve()
    assert (folder / "fig1.png").stat().st_size > 10_000
    cases = records(folder)
    with_lanes = cases[cases["schedule"].notna()]
    assert set(with_lanes["method"]) >= {"ulysses", "hcms"}
    for case in with_lanes.to_dict("records"):
        assert traces.find(folder, case) == folder / "traces" / traces.name(case)
        timeline = traces.read(folder / "traces" / traces.name(case), case)
        assert timeline.schedule.name == case["schedule"]
        assert 0 < timeline.attention_ms <= timeline.duration_ms
        predicted = traces.find_predicted(folder, case)
        assert predicted is not None
        simulated = traces.read(predicted, case)
        assert (timeline.source, simulated.source) == ("measured", "predicted")
        assert simulated.duration_ms == pytest.approx(case["predicted_ms"], rel=0.02)  # but for the host's last part
    figure = exhibit("fig1").of(folder)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert [title.split(",")[0] for title in titles] == [
        "sdpa: Ulysses", "sdpa-flash: Ulysses", "sdpa: HCMS 1-1", "sdpa-flash: HCMS 1-1"
    ]  # fmt: skip
    plt.close(figure)


def test_committed_traces_are_found_by_their_older_names() -> None:
    for folder in sorted((ROOT / "paper_tables" / "records").glob("*/fig1")):
        for case in records(folder).to_dict("records"):
            if case["method"] == "ceiling" and pd.isna(case["schedule"]):
                continue  # attention alone on a GPU has no lanes
            path = traces.find(folder, case)
            assert path is not None
            assert traces.read(path, case).attention_ms > 0
        plt.close(exhibit("fig1").of(folder))


def test_lanes_and_kinds_that_the_timeline_does_not_know_are_drawn(tmp_path: Path) -> None:
    """Copies have a colour of their own, a new lane its own row under its name."""
    folder = make_run(tmp_path, "fig1", frames=(16,), cuts=("2-3",))
    serial_ops = serial((5,), split_qkv=True)
    ops: list[Any] = [
        ("pack", 0, "compute"), ("exchange", 0, "comm-in"), ("attend", 0, "compute"), ("arrange", 1, "spare"),
        ("attend", 1, "compute-2"), ("return", 1, "comm-out"), ("unpack", 1, "compute"),
    ]  # fmt: skip
    spans = tuple(Span(Op(*op), 10.0 * i, 10.0 * i + 9) for i, op in enumerate(ops))
    ours = Timeline(Schedule("made-up", (2, 3), tuple(span.op for span in spans)), spans, 70.0, "measured")
    for kernel in ("sdpa", "sdpa-flash"):
        with (folder / "records.jsonl").open("a") as file:
            rows = (folder / "records.jsonl").read_text().splitlines()
            file.writelines(row.replace('"sdpa"', '"sdpa-flash"') + "\n" for row in rows if kernel != "sdpa")
    for case in records(folder).to_dict("records"):
        if case["method"] in ("ulysses", "hcms"):
            timeline = predict(serial_ops, IdealCosts(0.25)) if case["method"] == "ulysses" else ours
            timeline.to_chrome_trace(folder / "traces" / traces.name(case))
    figure = exhibit("fig1").of(folder)
    labels = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert labels == ["attention", "attention, 2", "link, in", "link, out", "spare"]
    assert "copies on the device" in [text.get_text() for text in figure.legends[0].get_texts()]
    plt.close(figure)


@pytest.mark.parametrize("exp", ["fig2", "fig3", "fig4", "fig5", "fig8"])
def test_a_link_that_stands_in_is_named_and_no_other_is_mixed_in(exp: str, tmp_path: Path) -> None:
    table = records_of(tmp_path, exp)
    ghost = table.assign(link="ghost")
    ghost["latency_ms"] *= 2
    ghost["times_ms"] = [[2 * t for t in times] for times in ghost["times_ms"]]
    both = pd.concat([table, ghost], ignore_index=True)
    both.attrs = dict(table.attrs)
    figure, alone = FIGURES[exp](both), FIGURES[exp](ghost)
    assert re.search(r"one rank of [\d, or]+ on one Cpu Made Up, ghost link", figure.get_suptitle())
    assert "emulated" not in figure.get_suptitle()
    for ax, same in zip(figure.axes, alone.axes, strict=True):
        assert ax.get_ylim() == pytest.approx(same.get_ylim())
        assert len(ax.get_lines()) == len(same.get_lines())
    plt.close(figure)
    plt.close(alone)


def test_ranks_that_share_cores_are_marked(tmp_path: Path) -> None:
    figure = FIGURES["fig4"](records_of(tmp_path, "fig4"))
    assert any(text.get_text() == "ranks share cores" for text in figure.axes[0].texts)
    plt.close(figure)


def test_refused_and_wrong_cases_are_not_drawn(tmp_path: Path) -> None:
    table = records_of(tmp_path, "fig5")
    refused = table[table["link_ratio"] == 0.05].index
    table.loc[refused, ["latency_ms", "comm_ratio"]] = np.nan
    table.loc[refused, "times_ms"] = None
    table.loc[table["link_ratio"] == 0.1, "ok"] = False
    assert set(stats.measured(table)["link_ratio"]) == {0.2, 0.3, 0.45}
    plt.close(FIGURES["fig5"](table))


# --- tables and claims -----------------------------------------------------------------------------------------------


def test_equivalence_counts_what_is_bitwise_equal_by_kind_of_cut(tmp_path: Path) -> None:
    table = records(make_run(tmp_path, "table2", frames=(1,), cuts=CUTS[1:4], kernel_max_abs_err=2e-6))
    shown = TABLES["table2"](table)
    (row,) = rows(shown).values()
    assert [row[f"{kind} cuts"] for kind in ("equal", "uneven", "tapered")] == ["bitwise (2)"] * 3
    assert row["ring"] == "1.0e-06"
    table.loc[table["cut"] == "2-1-2", "bitwise_equal"] = [True, False]
    assert rows(TABLES["table2"](table))[0]["uneven cuts"] == "1.0e-06 (1 of 2 bitwise)"


def test_kernels_that_did_not_run_are_predicted_in_a_column_of_their_own(tmp_path: Path) -> None:
    shown = TABLES["table3"](records(make_run(tmp_path, "table3", frames=(9,), kernel_max_abs_err=2e-6)))
    by_kernel = rows(shown, "kernel")
    assert "%" in by_kernel["sdpa"]["gain over Ulysses"]
    assert pd.isna(by_kernel["sdpa"]["predicted elsewhere"])
    assert pd.isna(by_kernel["flash-attn"]["gain over Ulysses"])
    assert "%" in by_kernel["flash-attn"]["predicted elsewhere"]
    assert "n = 9" in shown.attrs["caption"]


# --- numbers behind the figures --------------------------------------------------------------------------------------


def test_speedups_are_paired_by_round() -> None:
    drift = np.linspace(1, 3, 20)  # a machine that slows down threefold while it is measured
    speedup = stats.ratio_of_medians(1.2 * drift, drift)
    assert speedup.value == pytest.approx(1.2)
    assert (speedup.low, speedup.high) == pytest.approx((1.2, 1.2)), "drift hits both, so it is no uncertainty"
    assert np.isnan(stats.ratio_of_medians([1.0], [1.0]).low)


def test_rank_correlation_and_reading_off() -> None:
    x = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert stats.rank_correlation(x, [1, 2, 3, 4, 5, 6]) == pytest.approx(1)
    assert stats.rank_correlation(x, [6, 5, 4, 3, 2, 1]) == pytest.approx(-1)
    assert stats.rank_correlation(x, [1] * 6) == 0
    assert stats.interpolated([0.2, 0.1], [4.0, 2.0], 0.15) == pytest.approx(3)
    assert stats.interpolated([0.2, 0.1], [4.0, 2.0], 0.25) is None


def test_kinds_of_cuts() -> None:
    kinds = {"2-2": "equal", "2-3": "uneven", "3-4-3": "uneven", "1-3-1": "tapered", "auto:1-8-1": "tapered"}
    assert {cut: parts.cut_shape(cut) for cut in kinds} == kinds


def test_the_map_of_figure_8_is_the_closed_forms() -> None:
    for ranks in (2, 4, 8):
        for ratio in (0.1, 0.3, 0.5):
            serial_ms = fig8.ideal_ms("ulysses", ratio, ranks)
            assert serial_ms / fig8.ideal_ms("ring", ratio, ranks) == pytest.approx(ring_speedup(ratio, ranks))
            assert serial_ms / fig8.ideal_ms("hcms", ratio, ranks) <= speedup_limit(ratio) + 1e-9
    assert fig8.choice({m: fig8.ideal_ms(m, 0.25, 2) for m in fig8.METHODS})[0] == "ring"
    assert fig8.choice({m: fig8.ideal_ms(m, 0.25, 8) for m in fig8.METHODS})[0] == "hcms"
    assert fig8.choice({"ulysses": 1.04, "ring": 1.0, "hcms": 1.01})[0] == "ulysses", "4 % is not worth it"


# --- names agree -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exp", NUMBERED)
def test_configuration_notebook_and_figure_have_one_name(exp: str) -> None:
    assert exp in FIGURES or exp in TABLES
    assert (ROOT / "notebooks" / f"{exp}.ipynb").is_file()
    assert script("run").composed([f"+exp={exp}"]).name == exp


def test_nothing_is_registered_that_cannot_be_run() -> None:
    assert {*FIGURES, *TABLES} <= set(NUMBERED)


def test_notebooks_are_the_template_and_hold_no_output() -> None:
    assert not stale()


def test_reproduce_fits_its_time_and_ends_with_the_claims() -> None:
    planned = steps()
    assert sum(step.budget_min or 0 for step in planned) < 60
    assert [step.name for step in planned][-2:] == ["fig6", "table1"]
    assert {*FIGURES, *TABLES} <= {step.name for step in planned}


def test_a_figure_registers_itself_under_a_name_of_its_own() -> None:
    assert {*(f"fig{i}" for i in range(1, 9)), *(f"table{i}" for i in range(1, 6))} <= set(exhibits())
    assert (exhibit("fig4").label, exhibit("table2").label) == ("Figure 4", "Table 2")
    with pytest.raises(ValueError, match=r"registered already, by hcms_lab\.report\.fig3"):
        register("fig3", "Another")(lambda records: None)
    with pytest.raises(ValueError, match="begin its name with fig or table"):
        register("chart", "Another")


def test_the_report_knows_every_link_as_the_library_has_it() -> None:
    """It reads records without torch, so it has names of its own."""
    assert set(parts.LINKS) == set(links())
    assert set(parts.ONE_OF_MANY) == {name for name, link in links().items() if link.one_for_all}
