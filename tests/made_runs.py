"""Runs made up for the tests of the report: real schema, invented numbers, written only where a test says.

Times follow the closed forms (serial = attention + communication, K chunks hide all of it but 1/K), so that figures
and verdicts drawn from them look like something.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from hcms_lab.ground.records import Record, RecordFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
METHODS = ("ulysses", "ulysses-packed", "hcms-serial", "hcms", "ring", "ceiling")


def script(name: str) -> ModuleType:
    """A script of experiments/ as a module; by path, since `site` and the like are names of other modules too."""
    path = Path(__file__).parent.parent / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def make_run(
    root: Path,
    exp: str = "fig3",
    *,
    slug: str = "cpu-made-up",
    ratios: Sequence[float] = (0.25,),
    frames: Sequence[int] = (9, 16),
    ranks: Sequence[int] = (2,),
    cuts: Sequence[str] = ("1-3-1",),
    workload: str = "wan_scaled",
    stamp: str = "2026-01-02_03-04-05",
    committed: bool = False,
    **changes: Any,
) -> Path:
    """Write one whole run and return its folder; `changes` overwrite fields of every record."""
    place = root / "paper_tables" / "records" / slug / exp
    folder = place if committed else root / "outputs" / exp / stamp
    (folder / "traces").mkdir(parents=True)
    records = [
        record
        for ratio in ratios
        for world_size in ranks
        for frame in frames
        for record in _cases(exp, slug, workload, ratio, world_size, frame, cuts)
    ]
    for record in records:
        for name, value in changes.items():
            setattr(record, name, value)
    RecordFile(folder / "records.jsonl").append(records)
    name = slug.replace("-", " ").title()
    env = {
        "commit": COMMIT,
        "dirty": False,
        "hardware": {"name": name, "slug": slug, "count": 1, "cores": 2},
        "link": "emulated",
        "python": "3.11.7",
        "torch": "2.13.0",
        "versions": {"torch": "2.13.0", "hcms": "0.1.0"},
        "driver": None,
        "cuda": None,
        "variables": {},
        "started": "2026-01-02T03:04:05+00:00",
    }
    (folder / "env.json").write_text(json.dumps(env))
    config = {
        "name": exp,
        "kind": "compare_methods",
        "workload": {"name": workload},
        "latent_frames": list(frames),
        "ranks": list(ranks),
        "link": {"kind": "emulated", "ratio": list(ratios)},
        "methods": list(METHODS),
        "cuts": list(cuts),
        "kernels": ["sdpa"],
        "output": "outputs",
        "resume": None,
    }
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    (folder / "traces" / "hcms.json").write_text(json.dumps({"traceEvents": []}))
    if not committed:
        latest = folder.parent / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(folder.name)
    return folder


def _cases(
    exp: str, slug: str, workload: str, ratio: float, world_size: int, frames: int, cuts: Sequence[str]
) -> list[Record]:
    attention_ms = 0.5 * frames**2 * (2 / world_size)
    comm_ms = attention_ms * ratio / (1 - ratio)
    serial_ms = attention_ms + comm_ms
    packed_ms = serial_ms * 0.99

    def record(method: str, latency_ms: float, cut: str | None = None) -> Record:
        times_ms = [latency_ms * (1 + 0.002 * (i - 4)) for i in range(9)]
        return Record(
            exp=exp,
            hardware=slug,
            workload=workload,
            link="emulated",
            link_ratio=ratio,
            link_gbps=0.1 / ratio,
            world_size=world_size,
            method=method,
            kernel="sdpa",
            dtype="float32",
            batch=1,
            seq_len=240 * frames,
            heads=10,
            head_dim=128,
            cut=cut,
            comm_ratio=ratio + 0.003,
            comm_ms=comm_ms,
            attention_ms=attention_ms,
            latency_ms=latency_ms,
            latency_iqr_ms=0.008 * latency_ms,
            latency_p95_ms=1.008 * latency_ms,
            times_ms=times_ms,
            ceiling_ms=attention_ms,
            speedup_vs_ulysses=serial_ms / latency_ms,
            speedup_vs_ring=attention_ms * 1.1 / latency_ms,
            hidden_fraction=(packed_ms - latency_ms) / (packed_ms - attention_ms),
            max_abs_err=1e-6,
            bitwise_equal=method != "ring",
            requested_path=method,
            actual_path=method,
            seed=0,
            frames=frames,
            n=9,
            warmup=2,
            ranks_per_core=1.0,
        )

    plain = {"ulysses": serial_ms, "ulysses-packed": packed_ms, "ring": attention_ms * 1.1, "ceiling": attention_ms}
    rows = [record(method, latency_ms) for method, latency_ms in plain.items()]
    for cut in cuts:
        chunks = len(cut.split("-"))
        rows.append(record("hcms-serial", serial_ms * 1.01, cut))
        rows.append(record("hcms", attention_ms + comm_ms / chunks, cut))
    return rows


def make_repository(root: Path) -> Path:
    """A repository as the report sees one: configurations, claims, two machines' records, a figure, a table."""
    import matplotlib.pyplot as plt
    import pandas as pd

    from hcms_lab.report import style
    from hcms_lab.report.tables import write_table

    conf = root / "conf" / "exp"
    conf.mkdir(parents=True)
    for name, title in (
        ("fig3", "Latency by sequence length."),
        ("fig4", "Rank counts."),
        ("table2", "Equivalence."),
        ("advise", "Advice without hardware."),
    ):
        (conf / f"{name}.yaml").write_text(
            f"# @package _global_\n# python experiments/run.py +exp={name}\n"
            f"defaults:\n  - /kind: microbench\nabout:\n  title: {title}\nname: {name}\n"
        )
    make_run(root, "fig3", slug="cpu-one", committed=True, ranks=(2, 4), cuts=("1-3-1", "2-3"))
    make_run(root, "fig3", slug="cpu-two", committed=True, ratios=(0.4,), cuts=("1-3-1",))
    make_run(root, "fig5", slug="cpu-one", committed=True, ratios=(0.1, 0.25, 0.4), frames=(11,))
    write_table("table2", pd.DataFrame({"kernel": ["sdpa"], "equal": [True]}), folder=root / "paper_tables")
    (root / "paper_tables" / "claims.csv").write_text(
        "name,claim,figure\nC1,faster than Ulysses,10 % to 17.5 %\nC8,uneven chunks,the same results\n"
    )
    (root / "paper_tables" / "table1.md").write_text("The claims.\n")
    with style.use():
        fig, ax = plt.subplots(figsize=style.size())
        ax.plot([1, 2], [2, 1], color=style.colour("hcms"))
    style.save(fig, "fig3", alt="A line that falls from 2 to 1.", folder=root / "figures")
    return root
