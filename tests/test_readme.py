"""The README's generated parts, and that a stale one is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hcms_lab.cli import main
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import newest, newest_runs
from hcms_lab.report.readme import BLOCKS, comparison, experiments, figures, hardware, results, updated
from made_runs import make_repository, make_run

pytestmark = pytest.mark.t0


def readme_with(*names: str) -> str:
    return "# Title\n\n" + "\n".join(f"<!-- begin:{n} -->\nSTALE\n<!-- end:{n} -->\nprose {n}\n" for n in names)


def test_order_and_words_of_experiments(tmp_path: Path) -> None:
    found = experiments(make_repository(tmp_path))
    assert [e.name for e in found] == ["fig3", "fig4", "table2", "advise"]
    assert found[0].label == "Figure 3"
    assert found[0].command == "python experiments/run.py +exp=fig3"
    assert found[0].what == "Latency by sequence length."


def test_index_says_what_was_not_run(tmp_path: Path) -> None:
    root = make_repository(tmp_path)
    rows = {line.split("|")[1].strip(): line for line in figures(root).splitlines()}
    assert "`python experiments/run.py +exp=fig3`" in rows["Figure 3"]
    assert "[fig3.pdf](figures/fig3.pdf), [fig3.png](figures/fig3.png)" in rows["Figure 3"]
    assert rows["Figure 4"].count("not run yet") == 2
    assert "[table2.md](paper_tables/table2.md)" in rows["Table 2"]
    assert "advise" not in rows


def test_time_of_each_machine(tmp_path: Path) -> None:
    root = make_repository(tmp_path)
    for slug, wall_s in (("cpu-one", 161.4), ("cpu-two", 59)):
        path = root / "paper_tables" / "records" / slug / "fig3" / "env.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "wall_s": wall_s}))
    assert "2 min 41 s (Cpu One); 59 s (Cpu Two)" in figures(root)


def test_results_and_comparison_come_from_committed_records(tmp_path: Path) -> None:
    root = make_repository(tmp_path)
    before = results(root)
    rows = {line.split("|")[1].split(":")[0].strip(): line for line in before.splitlines() if line.startswith("|")}
    assert "+20.0 %" in rows["C1"]
    assert "not run yet" in rows["C8"]
    assert "on" not in [cell.strip() for cell in before.splitlines()[0].split("|")]
    assert comparison(root) == "Table 5: not run yet.\n"
    make_run(root, "table5", slug="cpu-one", frames=(9,), committed=True)
    assert "2,160" in comparison(root)
    assert comparison(root).splitlines()[2].endswith("Cpu One |")

    make_run(root, "fig3", slug="cpu-one", ratios=(0.5,), stamp="2030-01-01_00-00-00")
    assert len(newest_runs("fig3", root)) == 2, "in the place of the committed run of the same machine"
    assert newest("fig3", root).name == "2030-01-01_00-00-00"
    assert results(root) == before, "a run of the reader's own does not make the README stale"


def test_hardware_has_a_row_a_machine(tmp_path: Path) -> None:
    rows = hardware(make_repository(tmp_path)).splitlines()
    assert len(rows) == 4
    assert "Cpu One" in rows[2]
    assert "[fig5](paper_tables/records/cpu-one/fig5)" in rows[2]
    assert "012345678" in rows[3]
    assert hardware(tmp_path / "empty") == "No committed records: not run yet.\n"


def test_only_marked_parts_change(tmp_path: Path) -> None:
    root = make_repository(tmp_path)
    text = readme_with(*BLOCKS)
    fresh = updated(text, root)
    assert "STALE" not in fresh
    assert all(f"prose {name}" in fresh for name in BLOCKS)
    assert updated(fresh, root) == fresh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker", "markers are missing"),
        (readme_with("wrong"), r"markers \['wrong'\]: known are results, figures, comparison, hardware"),
        ("<!-- begin:results -->\n", "do not pair up"),
    ],
)
def test_bad_markers(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        updated(text, tmp_path)


def test_command_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_repository(tmp_path)
    command = ["--root", str(root)]
    assert main(["readme", *command]) == 2
    (root / "README.md").write_text(readme_with("results", "figures"))
    assert main(["readme", *command, "--check"]) == 1
    assert "make readme" in capsys.readouterr().err
    assert "STALE" in (root / "README.md").read_text(), "a check changes nothing"
    assert main(["readme", *command]) == 0
    assert main(["readme", *command, "--check"]) == 0
    assert "up to date" in capsys.readouterr().out
