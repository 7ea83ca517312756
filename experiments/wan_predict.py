"""Whole clips predicted for the catalogue's GPUs: attention by the cost model, the rest by counting (table4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hcms.clip import ClipShape, heads_refusal
from hcms.schedule import catalogue
from hcms_lab.ground.checks import as_list, distinct, whole
from hcms_lab.ground.clip_record import ClipRecord, of_clip
from hcms_lab.ground.config import BaseConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.layers import MOST_OF_A_SIZE, gpus_of
from hcms_lab.ground.model_config import ClipConfig, ModelConfig, chosen_model, clips_of
from hcms_lab.ground.records import RecordFile
from hcms_lab.measure.wan.predict import ASSUMED, ClipPrediction, predict_clip, weights_gb

SOURCE = "predicted"  # what the W&B run is called
METHODS = ("ulysses", "ulysses-packed", "hcms", "ring")


@dataclass
class Settings(BaseConfig, ClipConfig):
    kind: str = "wan_predict"
    gpu: str | None = "all"  # a GPU of the catalogue, or all
    ranks: Any = field(default_factory=lambda: [2, 4, 8])  # an int or a list


def validate(cfg: Settings) -> None:
    """Refuse what the catalogue or the model cannot answer."""
    model = chosen_model(cfg)
    if model.dtype not in catalogue.DTYPES or model.transformer["attention_head_dim"] != catalogue.HEAD_DIM:
        raise UsageError(
            f"model={model.name}: rates are known for {' and '.join(catalogue.DTYPES)} and head size "
            f"{catalogue.HEAD_DIM} only; give a model of full size"
        )
    gpus_of(cfg.gpu)
    distinct("ranks", as_list(cfg.ranks), "nothing to predict; give at least one")
    for ranks in as_list(cfg.ranks):
        whole("ranks", ranks, 2, MOST_OF_A_SIZE)
        if refusal := heads_refusal(model.transformer["num_attention_heads"], ranks, f"model={model.name}"):
            raise UsageError(f"ranks={ranks}: {refusal}")
        for clip in clips_of(cfg, model):
            if refusal := clip.refusal(ranks):
                raise UsageError(refusal)


def run(cfg: Settings, folder: Path) -> bool:
    """Predict, record and print every GPU and link at every rank count and length."""
    model = chosen_model(cfg)
    file = RecordFile(folder / "records.jsonl")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    too_small = False
    for clip in clips_of(cfg, model):
        for ranks in as_list(cfg.ranks):
            table = Table(
                title=f"Predicted: {model.name}, {clip.frames} frames, {clip.tokens:,} tokens, {ranks} ranks, "
                f"{model.steps} steps",
                box=box.SIMPLE_HEAD,
            )
            for name in ("GPU", "link"):
                table.add_column(name, no_wrap=True)
            for name in ("rho", "clip s", "attention", "attention gain", "clip gain", "Ring, clip gain"):
                table.add_column(name, justify="right")
            table.add_column("cut")
            for gpu, link, found in _predictions(cfg, model, clip, ranks):
                file.append(list(_records(cfg, model, clip, ranks, gpu, link, found)))
                memory_gb = gpu.numbers["memory_gb"].value
                small = memory_gb is not None and memory_gb < weights_gb(model)
                too_small |= small
                table.add_row(
                    gpu.slug + ("*" if small else ""),
                    link,
                    f"{found.advice.comm_ratio:.0%}",
                    f"{found.clip_ms('ulysses') / 1e3:.0f}",
                    f"{found.share:.0%}",
                    f"{found.attention_speedup('hcms') - 1:+.1%}",
                    f"{found.clip_speedup('hcms') - 1:+.1%}",
                    f"{found.clip_speedup('ring') - 1:+.1%}",
                    found.cut,
                )
            console.print(table)
    print("Gains are over ulysses. What a prediction assumes is in its record; the coarse assumptions:")
    for note in ASSUMED:
        print(f"- {note}")
    if too_small:
        print(f"* holds less than the {weights_gb(model):.0f} GB of weights; sharding them is not in the prediction")
    return True


def _predictions(
    cfg: Settings, model: ModelConfig, clip: ClipShape, ranks: int
) -> Iterator[tuple[catalogue.Gpu, str, ClipPrediction]]:
    for gpu in gpus_of(cfg.gpu):
        for link in gpu.links.values():
            if ranks <= link.ranks:
                yield gpu, link.name, predict_clip(gpu, model, clip, ranks, link=link.name)


def _records(
    cfg: Settings,
    model: ModelConfig,
    clip: ClipShape,
    ranks: int,
    gpu: catalogue.Gpu,
    link: str,
    found: ClipPrediction,
) -> Iterator[ClipRecord]:
    rest: dict[str, Any] = {f"{part}_ms": ms for part, ms in found.rest_ms.items()}
    for method in METHODS:
        yield ClipRecord(
            exp=cfg.name,
            source="predicted",
            hardware=gpu.slug,
            workload=model.name,
            link=link,
            world_size=ranks,
            method=method,
            kernel=found.advice.kernel,
            dtype=model.dtype,
            batch=1,
            seq_len=clip.tokens,
            heads=int(model.transformer["num_attention_heads"]),
            head_dim=int(model.transformer["attention_head_dim"]),
            cut=found.cut if method == "hcms" else None,
            comm_ratio=found.advice.comm_ratio,
            predicted_ms=found.clip_ms(method),
            speedup_vs_ulysses=found.clip_speedup(method),
            speedup_vs_ring=found.clip_ms("ring") / found.clip_ms(method),
            plan_reason=found.advice.choice.reason if method == "hcms" else None,
            weights="random",  # a prediction knows sizes alone
            sharding="none",
            **of_clip(model, clip),
            self_attention_ms=found.attention_ms[method],
            **rest,
            self_attention_share=found.attention_ms[method] / found.clip_ms(method),
            attention_speedup_vs_ulysses=found.attention_speedup(method),
            amdahl_speedup=found.clip_speedup(method),
            assumed=list(found.assumed),
        )
