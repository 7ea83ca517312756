"""Predict one layer on every GPU of the catalogue, and put what was measured anywhere beside it (fig6)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hcms.schedule import catalogue
from hcms.schedule.advice import Advice, advise
from hcms.schedule.cost import Workload
from hcms.schedule.cut import format_cut
from hcms_lab.ground.checks import as_list
from hcms_lab.ground.config import BaseConfig, WorkloadConfig
from hcms_lab.ground.layers import check_priced
from hcms_lab.ground.records import Record, RecordFile

SOURCE = "predicted"  # what the W&B run is called; the measured lines beside are other runs'
MEASURED_IN = ("fig3", "fig4")  # the experiments that tell a hardware's gain over lengths and ranks


@dataclass(kw_only=True)
class PredictedRecord(Record):
    """A prediction from the catalogue: `predicted_ms` only, never `latency_ms`. Gains are over the faster Ulysses."""

    predicted_gain: float | None = None
    predicted_gain_low: float | None = None
    predicted_gain_high: float | None = None
    predicted_gain_freed: float | None = None  # if exchanges needed no SM, where attention's kernel holds them all
    verdict: str | None = None
    assumed: list[str] | None = None


@dataclass
class Settings(BaseConfig):
    kind: str = "hardware_types"
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    ranks: Any = 4  # an int or a list
    latent_frames: Any = field(default_factory=lambda: [9, 16])  # an int or a list


def validate(cfg: Settings) -> None:
    """Refuse a layer that the catalogue cannot price.

    Raises:
        UsageError: ranks that do not divide heads or tokens, one rank, or a dtype or head size without known rates.
    """
    check_priced(cfg.workload, cfg.ranks, cfg.latent_frames)


def run(cfg: Settings, folder: Path) -> bool:
    """Write a record a GPU, length and method, copy the measured ones, and print a table."""
    file = RecordFile(folder / "records.jsonl")
    shown = Table(title=f"{cfg.name}: predicted gain of HCMS over the faster Ulysses", caption="interval in brackets")
    for column in ("GPU", "link", "kernel"):
        shown.add_column(column)
    layers = _layers(cfg)
    for layer in layers:
        shown.add_column(f"{layer.ranks} GPUs, {layer.seq_len:,} tokens", justify="right")
    for gpu in catalogue.load().gpus.values():
        for link, wire in gpu.links.items():
            advices = [advise(gpu, layer, link=link) if layer.ranks <= wire.ranks else None for layer in layers]
            for advice in filter(None, advices):
                file.append(_records(cfg, advice))
            if any(advices):
                shown.add_row(gpu.name, link, gpu.kernel, *(_words(advice) if advice else "–" for advice in advices))
    file.append(measured_lines(cfg.name))
    Console().print(shown)
    return True


def _layers(cfg: Settings) -> list[Workload]:
    w = cfg.workload
    return [
        Workload(frames * w.tokens_per_frame, w.heads, ranks, w.head_dim, w.batch, w.dtype)
        for ranks in as_list(cfg.ranks)
        for frames in sorted(as_list(cfg.latent_frames))
    ]


def _words(advice: Advice) -> str:
    low, high = f"{100 * advice.gain_low:+.0f}", f"{100 * advice.gain_high:+.0f}"
    return f"{100 * advice.gain:+.1f} % [{low}, {high}], rho {advice.comm_ratio:.2f}: {advice.verdict}"


def _records(cfg: Settings, advice: Advice) -> list[Record]:
    layer, choice = advice.workload, advice.choice
    times_ms = {
        "ulysses": advice.ulysses_ms,
        "ulysses-packed": advice.ulysses_packed_ms,
        "hcms": advice.hcms_ms,
        "ring": advice.ring_ms,
    }
    made: list[Record] = []
    for method, predicted_ms in times_ms.items():
        record = PredictedRecord(
            exp=cfg.name,
            source="predicted",
            hardware=advice.gpu.slug,
            workload=cfg.workload.name,
            link=advice.link,
            world_size=layer.ranks,
            method=method,
            kernel=advice.kernel,
            dtype=layer.dtype,
            batch=layer.batch,
            seq_len=layer.seq_len,
            heads=layer.heads,
            head_dim=layer.head_dim,
            comm_ratio=advice.comm_ratio,
            predicted_ms=predicted_ms,
            frames=layer.seq_len // cfg.workload.tokens_per_frame,
            assumed=list(advice.assumed),
        )
        if method == "hcms":
            record.cut, record.prefetch, record.plan_reason = format_cut(choice.cut), choice.prefetch, choice.reason
            record.schedule, record.verdict = choice.schedule().name, advice.verdict
            record.predicted_gain, record.predicted_gain_freed = advice.gain, advice.freed_gain
            record.predicted_gain_low, record.predicted_gain_high = advice.gain_low, advice.gain_high
        made.append(record)
    return made


def measured_lines(exp: str) -> list[dict[str, Any]]:
    """Records of `MEASURED_IN` of every hardware that has some: this machine's newest and the committed ones."""
    from hcms_lab.ground.load import newest_runs

    lines = []
    for name in MEASURED_IN:
        for table in newest_runs(name):
            place = Path(table.attrs["folder"])
            run = f"{place.parent.name}/{name}"  # what was timed together; a variant's folder names its link
            for line in (place / "records.jsonl").read_text().splitlines():
                record = json.loads(line)
                if record["source"] == "measured":
                    lines.append(record | {"exp": exp, "run": run})
    return lines
