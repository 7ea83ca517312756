"""Whole clips on ranks: methods interleaved clip by clip in one process, each timed, broken down and compared.

Every method makes the same clips from the same seeds with the same weights. Latents after every step and the frames at
the end are compared with those of `ulysses`; nothing is timed whose result is not checked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.clip import ClipShape
from hcms.diffusers import parallelize, restore
from hcms_lab.ground.clip_record import ClipRecord, against_ulysses, of_clip
from hcms_lab.ground.model_config import ModelConfig
from hcms_lab.ground.records import RecordFile
from hcms_lab.measure.cases import Case, Point
from hcms_lab.measure.contestant import cut_of, path_of
from hcms_lab.measure.job import Job
from hcms_lab.measure.launch import Rank
from hcms_lab.measure.link import settle
from hcms_lab.measure.timing import gathered
from hcms_lab.measure.wan import build
from hcms_lab.measure.wan.breakdown import DENOISING, PARTS, Breakdown

# A result that is not bitwise equal must be this close to the largest latent. A wrong exchange is off by all of it.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class ClipJob:
    """What every rank needs to know of a run.

    Args:
        model: with the run's own steps, guidance and flow_shift.
        source: where pretrained weights come from; None builds random ones.
        job: the micro-benchmarks' job, for the link and for what records repeat.
        points: one a clip length; their cases are the methods.
        clips: the clips' shapes, in the points' order.
        compare_plain: each rank also runs the unchanged pipeline alone, once a length.
    """

    model: ModelConfig
    source: str | None
    job: Job
    points: tuple[Point, ...]
    clips: tuple[ClipShape, ...]
    prompt: str
    negative_prompt: str
    image: str | None
    sharding: str
    vae_tiling: bool
    compare_plain: bool


@dataclass
class _Entrant:
    """A method and what its clips gave on this rank."""

    case: Case
    attention: SequenceParallelAttention
    totals_ms: list[float] = field(default_factory=list)
    parts_ms: list[dict[str, float]] = field(default_factory=list)
    steps_ms: list[list[dict[str, float]]] = field(default_factory=list)
    comm_ratio: float | None = None
    latents_equal: bool = True
    frames_equal: bool = True
    max_abs_err: float = 0.0
    worst: float = 0.0  # largest error over largest latent
    plain_max_abs_err: float | None = None
    plain_worst: float = 0.0  # of the last latents against the unchanged pipeline, over the largest latent
    plain_bitwise_equal: bool | None = None
    peak_bytes: int = 0


@dataclass
class _Made:
    """What a clip came out as."""

    latents: list[Tensor]  # after each step
    frames: np.ndarray


def measure_clips(rank: Rank, clip_job: ClipJob, tick: Callable[[str], None]) -> None:
    """Measure all lengths on this rank; the first rank writes records, clip by clip and a method each, and a video."""
    folder = Path(clip_job.job.folder)
    if clip_job.source is None:
        pipe = build.random_pipeline(clip_job.model, rank.device, clip_job.job.seed, sharding=clip_job.sharding)
    else:
        pipe = build.pretrained_pipeline(clip_job.model, clip_job.source, rank.device, sharding=clip_job.sharding)
    pipe.set_progress_bar_config(disable=True)
    if clip_job.vae_tiling:
        pipe.vae.enable_tiling()
    gbps_of_ratio = dict(clip_job.job.gbps_of_ratio)
    records = RecordFile(folder / "records.jsonl")
    for point, clip in zip(clip_job.points, clip_job.clips, strict=True):
        gbps = settle(rank, clip_job.job, point, gbps_of_ratio)
        entrants = [_entrant(case, point, clip_job.job.profile) for case in point.cases]
        made = _interleave(rank, clip_job, pipe, clip, entrants, folder, tick)
        found = _records(rank, clip_job, point, clip, gbps, entrants)
        if rank.first:
            records.append(list(found))
            _write_media(folder, made, clip, clip_job.model.fps)


def _entrant(case: Case, point: Point, profile: str | None) -> _Entrant:
    attention = SequenceParallelAttention(
        None,
        case.method,
        case.cut or "auto",
        point.kernel,
        prefetch=case.prefetch,
        first=case.first,  # pyright: ignore[reportArgumentType]
        profile=profile,
    )
    return _Entrant(case, attention)


def _interleave(
    rank: Rank,
    clip_job: ClipJob,
    pipe: build.Pipeline,
    clip: ClipShape,
    entrants: list[_Entrant],
    folder: Path,
    tick: Callable[[str], None],
) -> _Made:
    """Warm up, then rounds of one clip a method in shuffled order; returns the last hcms clip (else the last)."""
    job = clip_job.job
    breakdown = Breakdown(rank.device)
    plain = _clip(pipe, clip_job, clip, job.seed, breakdown, rank.device) if clip_job.compare_plain else None
    title = f"{clip.frames} frames, {clip.tokens:,} tokens"
    for e in entrants:
        for warm in range(job.warmup):
            _time_clip(rank, clip_job, pipe, clip, e, job.seed, breakdown, warming=True)
            if rank.first and warm == 0:
                tick(f"{title}: warm-up, {e.case.method}")
    last: dict[str, _Made] = {}
    for iteration in range(job.iterations):
        seed = job.seed + iteration
        order = entrants.copy()
        random.Random(job.seed * 100_003 + iteration).shuffle(order)
        made: dict[int, _Made] = {}
        for e in order:
            made[id(e)] = _time_clip(rank, clip_job, pipe, clip, e, seed, breakdown)
            last[e.case.method] = made[id(e)]
            if rank.first:
                _note_clip(folder, clip, e, iteration, seed)
                tick(f"{title}: clip {iteration + 1}, {e.case.method}")
        expected = made[id(next(e for e in entrants if e.case.method == "ulysses"))]
        for e in entrants:
            _compare(e, made[id(e)], expected)
            if iteration == 0 and plain is not None:
                ours, theirs = made[id(e)].latents[-1], plain.latents[-1]
                e.plain_max_abs_err = _largest_error(ours, theirs)
                e.plain_worst = e.plain_max_abs_err / theirs.abs().max().item()
                e.plain_bitwise_equal = torch.equal(ours, theirs)
    return last.get("hcms") or next(iter(last.values()))


def _time_clip(
    rank: Rank,
    clip_job: ClipJob,
    pipe: build.Pipeline,
    clip: ClipShape,
    e: _Entrant,
    seed: int,
    breakdown: Breakdown,
    *,
    warming: bool = False,
) -> _Made:
    """One clip of one method. Timelines, which synchronise a GPU, are only kept while warming up."""
    e.attention.record_timeline = warming
    attention_ms = whole_ms = 0.0

    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        nonlocal attention_ms, whole_ms
        out_BLNH = e.attention(q_BLNH, k_BLNH, v_BLNH)
        if warming and (timeline := e.attention.timeline) is not None:
            attention_ms += timeline.attention_ms
            whole_ms += timeline.duration_ms
        return out_BLNH

    e.attention.poison()
    if rank.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rank.device)
    parallelize(pipe, attention=breakdown.attention(attend))
    try:
        dist.barrier(rank.control)
        made = _clip(pipe, clip_job, clip, seed, breakdown, rank.device)
    finally:
        restore(pipe)
    if warming:
        e.comm_ratio = 1 - attention_ms / whole_ms
        return made
    if rank.device.type == "cuda":
        e.peak_bytes = max(e.peak_bytes, torch.cuda.max_memory_allocated(rank.device))
    e.totals_ms.append(breakdown.total_ms)
    e.parts_ms.append(breakdown.parts())
    e.steps_ms.append(breakdown.by_step())
    return made


def _clip(
    pipe: build.Pipeline, clip_job: ClipJob, clip: ClipShape, seed: int, breakdown: Breakdown, device: torch.device
) -> _Made:
    """Run the pipeline once, from a prompt to frames."""
    model = clip_job.model
    latents: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"].clone())
        return tensors

    arguments: dict[str, Any] = {
        "prompt": clip_job.prompt,
        "negative_prompt": clip_job.negative_prompt,
        "height": clip.height,
        "width": clip.width,
        "num_frames": clip.frames,
        "num_inference_steps": model.steps,
        "guidance_scale": model.guidance,
        "max_sequence_length": model.text_tokens,
        "generator": torch.Generator(device).manual_seed(seed),
        "callback_on_step_end": keep,
        "output_type": "np",
    }
    if model.boundary_ratio is not None:
        arguments["guidance_scale_2"] = model.guidance_2
    if model.task == "i2v":
        arguments["image"] = first_frame(clip_job.image, clip)
    breakdown.clear()
    with breakdown.watching(pipe), breakdown.clip():
        frames = pipe(**arguments).frames
    return _Made(latents, np.asarray(frames))


def first_frame(path: str | None, clip: ClipShape) -> Any:
    """The picture that an i2v clip starts from: a file's, scaled to the clip, or a colour gradient."""
    from PIL import Image

    if path is not None:
        return Image.open(path).convert("RGB").resize((clip.width, clip.height))
    rows, columns = np.mgrid[0 : clip.height, 0 : clip.width]
    red, green = 255 * columns / clip.width, 255 * rows / clip.height
    return Image.fromarray(np.stack([red, green, 255 - red], axis=-1).astype(np.uint8))


def _compare(e: _Entrant, made: _Made, expected: _Made) -> None:
    for ours, theirs in zip(made.latents, expected.latents, strict=True):
        e.latents_equal &= torch.equal(ours, theirs)
        error = _largest_error(ours, theirs)
        e.max_abs_err = max(e.max_abs_err, error)
        e.worst = max(e.worst, error / theirs.abs().max().item())
    e.frames_equal &= bool(np.array_equal(made.frames, expected.frames))


def _largest_error(ours: Tensor, theirs: Tensor) -> float:
    """Infinite where it is not finite."""
    error = (ours.double() - theirs.double()).abs().max().item()
    return error if np.isfinite(error) else np.inf


def _note_clip(folder: Path, clip: ClipShape, e: _Entrant, iteration: int, seed: int) -> None:
    """Append the first rank's view of a clip to clips.jsonl, so that a run that dies keeps what it measured."""
    line = {
        "num_frames": clip.frames,
        "method": e.case.method,
        "cut": e.case.cut,
        "clip": iteration,
        "seed": seed,
        "total_ms": e.totals_ms[-1],
        "parts_ms": e.parts_ms[-1],
        "steps_ms": e.steps_ms[-1],
    }
    with (folder / "clips.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _write_media(folder: Path, made: _Made, clip: ClipShape, fps: int) -> None:
    from diffusers.utils import export_to_video
    from PIL import Image

    media = folder / "media"
    media.mkdir(exist_ok=True)
    video = made.frames[0]
    Image.fromarray((video[len(video) // 2] * 255).round().astype(np.uint8)).save(media / f"still-{clip.frames}.png")
    export_to_video(list(video), str(media / f"video-{clip.frames}.mp4"), fps=fps)


def _records(
    rank: Rank, clip_job: ClipJob, point: Point, clip: ClipShape, gbps: float | None, entrants: list[_Entrant]
) -> list[ClipRecord]:
    job, model = clip_job.job, clip_job.model
    found: list[ClipRecord] = []
    for e in entrants:
        by_rank = gathered(
            rank, (e.totals_ms, e.parts_ms, e.steps_ms, e.comm_ratio, e.latents_equal, e.frames_equal, e.max_abs_err,
                   e.worst, e.plain_max_abs_err, e.plain_bitwise_equal, e.peak_bytes, e.plain_worst)
        )  # fmt: skip
        # Each clip as its slowest rank saw it, so that parts and whole belong together.
        slowest = [max(range(rank.ranks), key=lambda r: by_rank[r][0][i]) for i in range(job.iterations)]
        totals = [by_rank[r][0][i] for i, r in enumerate(slowest)]
        parts = [by_rank[r][1][i] for i, r in enumerate(slowest)]
        by_step = list(zip(*(by_rank[r][2][i] for i, r in enumerate(slowest)), strict=True))
        q25, q50, q75, q95 = (float(x) for x in np.percentile(totals, [25, 50, 75, 95]))
        # The clip in the middle (or the two whose mean the median is), so that its parts add up to latency_ms.
        middle = sorted(range(len(totals)), key=totals.__getitem__)[(len(totals) - 1) // 2 : len(totals) // 2 + 1]
        of_middle = {name: mean(parts[i][name] for i in middle) for name in PARTS}
        plain_errors = [b[8] for b in by_rank if b[8] is not None]
        equal, worst = all(b[4] for b in by_rank), max(b[7] for b in by_rank)
        error = max(b[6] for b in by_rank)
        schedule, path, cut = e.attention.schedule, path_of(e.attention), cut_of(e.attention)
        off_plain = max(b[11] for b in by_rank)
        wrong = None
        if off_plain > TOLERANCE[model.dtype]:
            wrong = f"{off_plain:.3g} of the largest latent away from the unchanged pipeline"
        elif not (equal if e.case.method != "ring" else worst <= TOLERANCE[model.dtype]):
            wrong = f"{worst:.3g} of the largest latent away from ulysses"
        found.append(
            ClipRecord(
                exp=job.exp,
                status="failed" if wrong else "done",
                error=f"wrong result: {wrong}" if wrong else None,
                ok=wrong is None,
                hardware=job.hardware,
                workload=model.name,
                link=job.link,
                link_ratio=point.link_ratio,
                link_gbps=gbps,
                world_size=rank.ranks,
                method=e.case.method,
                kernel=point.kernel,
                dtype=model.dtype,
                batch=1,
                seq_len=clip.tokens,
                heads=point.heads,
                head_dim=point.head_dim,
                cut=f"auto:{cut}" if e.case.cut == "auto" else e.case.cut,
                schedule=schedule.name if schedule is not None else None,
                comm_ratio=median(b[3] for b in by_rank) if job.warmup and e.case.method == "ulysses" else None,
                latency_ms=q50,
                latency_iqr_ms=q75 - q25,
                latency_p95_ms=q95,
                times_ms=totals,
                n=len(totals),
                warmup=job.warmup,
                peak_mem_gib=max(b[10] for b in by_rank) / 2**30 or None,
                buffer_gib=e.attention.buffer_bytes / 2**30,
                max_abs_err=error if np.isfinite(error) else None,
                bitwise_equal=equal and all(b[5] for b in by_rank),
                requested_path="/".join(x for x in (e.case.method, e.case.cut, point.kernel) if x),
                actual_path=path,
                plan_reason=e.attention.plan_reason,
                predicted_ms=None,
                seed=job.seed,
                prefetch=e.case.prefetch,
                ranks_per_core=job.ranks_per_core,
                weights="random" if clip_job.source is None else "pretrained",
                sharding=clip_job.sharding,
                **of_clip(model, clip),
                **{f"{name}_ms": ms for name, ms in of_middle.items()},
                named_share=1 - of_middle["other"] / q50,
                self_attention_share=median(p["self_attention"] / t for p, t in zip(parts, totals, strict=True)),
                self_attention_times_ms=[p["self_attention"] for p in parts],
                attention_layer_times_ms=[p["self_attention"] + p["self_projections"] for p in parts],
                step_times_ms=[median(sum(s[part] for part in DENOISING) for s in step) for step in by_step],
                self_attention_by_step_ms=[median(s["self_attention"] for s in step) for step in by_step],
                latents_equal=equal,
                frames_equal=all(b[5] for b in by_rank),
                plain_max_abs_err=max(plain_errors) if plain_errors and np.isfinite(plain_errors).all() else None,
                plain_bitwise_equal=all(b[9] for b in by_rank) if plain_errors else None,
            )
        )
    against_ulysses(found, job.seed)
    return found
