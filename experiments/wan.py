"""The whole Wan2.2 pipeline, clip by clip: method against method, broken down into its parts (fig7)."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hcms.clip import ClipShape, divisors, heads_refusal, listed
from hcms.hardware import hardware
from hcms.methods import METHODS
from hcms.schedule.cost import Workload
from hcms_lab.ground.checks import as_list, is_folder, number, one_of, readable, whole
from hcms_lab.ground.config import CasesConfig, Config
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.model_config import ClipConfig, ModelConfig, chosen_model, clips_of
from hcms_lab.ground.names import KERNELS
from hcms_lab.ground.records import RecordFile, derived_gbps
from hcms_lab.measure.cases import (
    EMULATED,
    Case,
    Point,
    cases_of,
    check_run,
    device_of,
    latency_us_of,
    link_of,
    one_for_all,
    ranks_of,
    ratios_of,
)
from hcms_lab.measure.fits import check_memory, check_pace
from hcms_lab.measure.wan.folder import as_saved
from hcms_lab.report.terminal_clips import clip_tables

NEEDS = ("diffusers", "transformers", "accelerate")
CARDS_GB = (24, 32, 48, 80, 96, 141, 180)  # memories of the catalogue's GPUs


@dataclass
class Settings(Config, ClipConfig, CasesConfig):
    kind: str = "wan"
    weights: str = "random"  # random | pretrained
    weights_path: str | None = None  # a folder written by save_pretrained, or a hub name; null is the model's own
    prompt: str = "A cat and a dog bake a cake together in a sunlit kitchen."
    negative_prompt: str = ""
    image: str | None = None  # first frame for i2v: a picture's path; null is a colour gradient
    sharding: str = "none"  # none | fsdp2
    vae_tiling: bool = False  # decode in tiles: less memory, other frames at the tiles' edges
    timed: str = "clips"  # clips | steps: whole clips, or denoising steps of one expert, of which clips are composed
    layers_timed: int | None = None  # of timed steps: no more transformer blocks are built; null is all. Clips have all
    compare_plain: bool = False  # also run the unchanged pipeline on each rank alone, and compare frames with it
    dry: bool = False  # check sizes and memory, load nothing
    memory_gib: float | None = None  # memory a rank that the check counts with; null is what is there


def writes(cfg: Settings) -> bool:
    """A dry run has nothing to record."""
    return not cfg.dry


def validate(cfg: Settings) -> None:
    """Refuse what could not run, memory included, before any rank starts and before any weight is loaded."""
    check_run(cfg)
    one_of("timed", cfg.timed, ("clips", "steps"))
    if one_for_all(cfg) and cfg.timed == "clips" and not cfg.dry:
        raise UsageError(
            f"link.kind={link_of(cfg)}: no whole clip can be made with peers that are memory; give timed=steps, "
            f"device=cpu, or start it on several GPUs"
        )
    if cfg.memory_gib is not None:
        number("memory_gib", cfg.memory_gib, 0, 1e6, above=True)
    model, source = resolved(cfg)
    clips = clips_of(cfg, model)
    _check_steps(cfg)
    all_ranks = ranks_of(cfg)
    heads = model.transformer["num_attention_heads"]
    for ranks in all_ranks:
        if refusal := heads_refusal(heads, ranks, f"model={model.name}"):
            raise UsageError(f"ranks={ranks}: {refusal}")
        cases_at(cfg, heads, ranks)
        for clip in clips:
            if refusal := clip.refusal(ranks):
                raise UsageError(refusal)
            layer = Workload(clip.tokens, heads, ranks, model.transformer["attention_head_dim"], 1, model.dtype)
            if link_of(cfg) == EMULATED:
                check_pace(layer, cfg.link.gbps, latency_us_of(cfg))
            if not cfg.dry and cfg.memory_gib is None:  # one layer, before the whole model is built to be counted
                check_memory(layer, f"frames={clip.frames}", device_of(cfg))
    needs = (*NEEDS, "imageio_ffmpeg") if cfg.timed == "clips" else NEEDS  # steps write no video
    if missing := [name for name in needs if find_spec(name) is None]:
        raise UsageError(f"{cfg.name} needs {', '.join(missing)}: pip install -e '.[lab]'")
    _check_kernel(cfg, model)
    if source is not None and not Path(source).is_dir():
        _check_hub(source)
    _check_memory(cfg, model, clips, all_ranks)


def run(cfg: Settings, folder: Path | None) -> bool:
    """Measure every clip length that the folder's records do not hold yet; print the tables; True if all is ok."""
    model, source = resolved(cfg)
    if cfg.dry:
        return dry_run(cfg, model)
    assert folder is not None
    from hcms_lab.measure.job import Job
    from hcms_lab.measure.launch import launch
    from hcms_lab.measure.progress import progress
    from hcms_lab.measure.wan.clip_job import ClipJob

    device, link = device_of(cfg), link_of(cfg)
    file = RecordFile(folder / "records.jsonl")
    slug = hardware(device).slug
    heads = int(model.transformer["num_attention_heads"])
    todo: dict[int, list[tuple[Point, ClipShape]]] = {}
    for ranks in ranks_of(cfg):
        cases = cases_at(cfg, heads, ranks)
        for ratio in ratios_of(cfg):
            for clip in sorted(clips_of(cfg, model), key=lambda c: -c.tokens):  # the longest first: it sets the link
                point = _point(model, clip, ranks, cfg.kernels[0], ratio if ranks > 1 else None, cases)
                if not _recorded(file, point, clip):
                    todo.setdefault(ranks, []).append((point, clip))
    found = file.read()
    clips_a_length = sum(len(point.cases) for pairs in todo.values() for point, _ in pairs)
    with progress(clips_a_length * (cfg.bench.iterations + 1), cfg.name) as (ticks, show):
        for ranks, pairs in todo.items():
            job = Job.of(cfg, ranks, (), folder, predict=False, gbps_of_ratio=derived_gbps(found, ranks))
            clip_job = ClipJob(
                model=model,
                source=source,
                job=job,
                points=tuple(point for point, _ in pairs),
                clips=tuple(clip for _, clip in pairs),
                prompt=cfg.prompt,
                negative_prompt=cfg.negative_prompt,
                image=cfg.image,
                sharding=cfg.sharding,
                vae_tiling=cfg.vae_tiling,
                compare_plain=cfg.compare_plain,
                layers_timed=_layers_timed(cfg, model),
            )
            launch(
                _clips_on_rank if cfg.timed == "clips" else _steps_on_rank,
                ranks,
                clip_job,
                ticks,
                device=device,
                link=link,
                folder=folder,
                poll=show,
                timeout_s=cfg.bench.timeout_s,
                forked_with=(f"hcms_lab.measure.wan.{cfg.timed}", "diffusers.pipelines.wan.pipeline_wan"),
            )
    found = file.read()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for shown in clip_tables(found, f"{cfg.name}: {model.name}, {cfg.weights} weights, {slug}, link {link}"):
        console.print(shown)
    return bool(found) and all(r["ok"] for r in found)


def _clips_on_rank(rank: Any, clip_job: Any, ticks: Any) -> None:
    from hcms_lab.measure.wan.clips import measure_clips

    measure_clips(rank, clip_job, ticks.put)


def _steps_on_rank(rank: Any, clip_job: Any, ticks: Any) -> None:
    from hcms_lab.measure.wan.steps import measure_steps

    measure_steps(rank, clip_job, ticks.put)


def resolved(cfg: Settings) -> tuple[ModelConfig, str | None]:
    """The model with the run's own settings in it, and where its weights come from (None: random).

    Raises:
        UsageError: no model, an unknown choice, a number out of range, no picture, or a folder that holds no pipeline.
    """
    model = chosen_model(cfg)
    one_of("weights", cfg.weights, ("random", "pretrained"))
    one_of("sharding", cfg.sharding, ("none", "fsdp2"))
    if cfg.image is not None:
        _check_picture(cfg.image)
    if cfg.weights == "random":
        if cfg.weights_path is not None:
            raise UsageError(
                f"weights_path={cfg.weights_path}: weights=random reads none; give weights=pretrained with it"
            )
        return model, None
    source = cfg.weights_path or model.hub
    if source is None:
        raise UsageError(f"weights=pretrained: model={model.name} is not on the hub; give weights_path=<folder>")
    if is_folder(source):
        return as_saved(model, Path(source)), source
    if cfg.weights_path is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UsageError(
            f"weights_path={source}: no such folder; give one that save_pretrained wrote, or owner/name on the hub"
        )
    return model, source


def _layers_timed(cfg: Settings, model: ModelConfig) -> int:
    """How many of the transformer's blocks are built."""
    layers = int(model.transformer["num_layers"])
    return layers if cfg.timed == "clips" else min(cfg.layers_timed or layers, layers)


def _need_bytes(cfg: Settings, model: ModelConfig, count: Any) -> float:
    """Memory of a rank with one method's buffers, of a `RankCount`."""
    if cfg.timed == "clips":
        return count.need_bytes
    return count.steps_need_bytes(int(model.transformer["num_layers"]) - _layers_timed(cfg, model))


def _check_steps(cfg: Settings) -> None:
    """Refuse what timed steps cannot have, and what only they have."""
    if cfg.layers_timed is not None:
        whole("layers_timed", cfg.layers_timed)
    if cfg.timed == "clips":
        return
    if cfg.weights != "random":
        raise UsageError(f"weights={cfg.weights}: timed=steps builds one expert with random weights; give timed=clips")
    if one_for_all(cfg):
        for name, value, of_all in (("sharding", cfg.sharding, "none"), ("compare_plain", cfg.compare_plain, False)):
            if value != of_all:
                raise UsageError(
                    f"{name}={value}: over link.kind={link_of(cfg)} peers are memory; give {name}={of_all}"
                )


def _check_picture(path: str) -> None:
    advice = "give a picture's path, or null for a colour gradient"
    file = readable("image", path, advice, at_most_mib=64)
    from PIL import Image

    try:
        with warnings.catch_warnings(action="error"), Image.open(file) as picture:  # a bomb is a warning to Pillow
            picture.verify()
    except Exception as error:  # Pillow's formats raise whatever a broken file leads them to
        raise UsageError(f"image={path}: no picture ({' '.join(str(error).split())}); {advice}") from None


def cases_at(cfg: Settings, heads: int, ranks: int) -> tuple[Case, ...]:
    """The methods on so many ranks, each with its cuts; ulysses is among them, as everything is compared with it."""
    for method in cfg.methods:
        one_of("methods", method.partition("@")[0], METHODS)
    cases = cases_of(cfg.methods, cfg.cuts, heads // ranks, ranks, cfg.prefetch, cfg.first)
    if "ulysses" not in cfg.methods:
        raise UsageError(f"methods={list(cfg.methods)}: add ulysses, with which every method's latents are compared")
    return cases


def _point(
    model: ModelConfig, clip: ClipShape, ranks: int, kernel: str, ratio: float | None, cases: tuple[Case, ...]
) -> Point:
    return Point(
        model.name,
        ranks,
        clip.latent_frames,
        clip.tokens,
        int(model.transformer["num_attention_heads"]),
        int(model.transformer["attention_head_dim"]),
        1,
        model.dtype,
        kernel,
        ratio,
        cases,
    )


def _recorded(file: RecordFile, point: Point, clip: ClipShape) -> bool:
    have = {
        (r["world_size"], r["link_ratio"], r["num_frames"], r["method"], r["cut"] and r["cut"].split(":")[0])
        for r in file.read()
        if r["status"] == "done"
    }
    return all((point.ranks, point.link_ratio, clip.frames, c.method, c.cut) in have for c in point.cases)


def _check_kernel(cfg: Settings, model: ModelConfig) -> None:
    if len(cfg.kernels) != 1:
        raise UsageError(f"kernels={list(cfg.kernels)}: give one of {', '.join(KERNELS)}")
    import torch

    from hcms.kernels import kernel

    attention, head_dim = kernel(cfg.kernels[0]), int(model.transformer["attention_head_dim"])
    if not cfg.dry and (refusal := attention.refusal(getattr(torch, model.dtype), head_dim, device_of(cfg))):
        raise UsageError(f"kernels={cfg.kernels[0]}: {refusal}")
    if "ring" in cfg.methods and not attention.gives_lse:
        raise UsageError(f"kernels={cfg.kernels[0]}: gives no log-sum-exp, which ring needs; take ring out of methods")


def _check_hub(source: str) -> None:
    from hcms_lab.measure.wan.folder import hub_refusal

    if why := hub_refusal(source):
        raise UsageError(
            f"weights=pretrained: {source} is no folder here, and the hub does not give it ({why}); "
            f"give weights_path=<folder>"
        )


def _check_memory(cfg: Settings, model: ModelConfig, clips: list[ClipShape], all_ranks: list[int]) -> None:
    from hcms_lab.measure.fits import GIB, available_bytes

    longest = max(clips, key=lambda c: c.tokens)
    needs = {n.ranks: n for n in _needs(cfg, model, longest)}
    if cfg.dry:  # its table says what fits
        return
    heads = int(model.transformer["num_attention_heads"])
    for ranks in all_ranks:
        there = cfg.memory_gib * GIB if cfg.memory_gib is not None else available_bytes(device_of(cfg), ranks)
        if ranks not in needs:
            continue
        others = len(cases_at(cfg, heads, ranks)) - 1  # every method keeps its own buffers
        need = others * needs[ranks].buffer_bytes + _need_bytes(cfg, model, needs[ranks])
        if need > there:
            raise UsageError(
                f"model={model.name}: {longest.frames} frames need {need / GIB:.1f} GiB a rank on "
                f"{ranks} ranks, but {there / GIB:.1f} GiB are there; see dry=true, try sharding=fsdp2 or "
                f"vae_tiling=true, or give model=wan-tiny"
            )


def _needs(cfg: Settings, model: ModelConfig, clip: ClipShape) -> list[Any]:
    from hcms_lab.measure.wan.memory import rank_counts

    try:
        return rank_counts(model, clip, sharding=cfg.sharding, guidance=model.guidance > 1, vae_tiling=cfg.vae_tiling)
    except Exception as error:  # diffusers and transformers raise whatever an argument leads them to
        why = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"model={model.name}: its arguments build no model: {why:.200}") from None


def dry_run(cfg: Settings, model: ModelConfig) -> bool:
    """Print sizes, traffic and memory a rank for every rank count; False if a wanted one does not fit."""
    from hcms_lab.measure.wan.memory import GIB

    fits_all = True
    for clip in clips_of(cfg, model):
        time, rows, columns = clip.grid
        title = (
            f"{model.name}: {clip.frames} frames of {clip.width}x{clip.height} = {time} x {rows} x {columns} = "
            f"{clip.tokens:,} tokens; {model.experts} expert(s) of {model.transformer['num_layers']} layers, "
            f"{model.dtype}, sharding {cfg.sharding}"
        )
        caption = "weights, and the larger of a denoising step and the decoding, and 1 GiB"
        if cfg.timed == "steps":
            caption = (
                f"weights of all; needs: one expert's {_layers_timed(cfg, model)} layers and a step, or either end"
            )
        table = Table(title=title, caption=caption)
        names = ("ranks", "tokens a rank", "heads a rank", "MiB off rank a layer", "GiB off rank a step")
        for name in (*names, "weights GiB", "step GiB", "decode GiB", "needs GiB a rank", "fits"):
            table.add_column(name, justify="right")
        for n in _needs(cfg, model, clip):
            need = _need_bytes(cfg, model, n)
            if cfg.memory_gib is not None:
                fits = need <= cfg.memory_gib * GIB
                verdict = "yes" if fits else f"no: {cfg.memory_gib:g} GiB"
                fits_all &= fits or n.ranks not in as_list(cfg.ranks)
            else:
                verdict = next((f"{gb} GB cards" for gb in CARDS_GB if need <= gb * 1e9), "no card here")
            table.add_row(
                str(n.ranks),
                f"{n.tokens_a_rank:,}",
                str(n.heads_a_rank),
                f"{n.exchange_bytes_a_layer / 2**20:.1f}",
                f"{n.exchange_bytes_a_step / 2**30:.2f}",
                *(f"{x / GIB:.1f}" for x in (n.weight_bytes, n.step_bytes, n.decode_bytes, need)),
                verdict,
            )
        Console(width=160).print(table)
        odd = [r for r in divisors(int(model.transformer["num_attention_heads"])) if r <= 16 and clip.tokens % r]
        if odd:
            print(f"{listed(odd)} ranks divide the heads but not the tokens: {clip.refusal(odd[0])}")
    return fits_all
