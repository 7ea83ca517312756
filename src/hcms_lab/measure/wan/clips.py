"""Whole clips on ranks: methods interleaved clip by clip in one process, each timed, broken down and compared.

Every method makes the same clips from the same seeds with the same weights. Latents after every step and the frames at
the end are compared with those of `ulysses`; nothing is timed whose result is not checked.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hcms.clip import ClipShape
from hcms.diffusers import parallelize, restore
from hcms_lab.ground.records import RecordFile
from hcms_lab.measure.launch import Rank
from hcms_lab.measure.link import settle
from hcms_lab.measure.wan import build
from hcms_lab.measure.wan.breakdown import Breakdown
from hcms_lab.measure.wan.clip_job import ClipJob, Entrant, Seen, entrant
from hcms_lab.measure.wan.clip_records import recorded


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
        entrants = [entrant(case, point, clip_job.job) for case in point.cases]
        made = _interleave(rank, clip_job, pipe, clip, entrants, folder, tick)
        found = recorded(rank, clip_job, point, clip, gbps, entrants)
        if rank.first:
            records.append(list(found))
            _write_media(folder, made, clip, clip_job.model.fps)


def _interleave(
    rank: Rank,
    clip_job: ClipJob,
    pipe: build.Pipeline,
    clip: ClipShape,
    entrants: list[Entrant],
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
            _compare(e.seen, made[id(e)], expected)
            if iteration == 0 and plain is not None:
                e.seen.compare_plain(made[id(e)].latents[-1], plain.latents[-1])
    return last.get("hcms") or next(iter(last.values()))


def _time_clip(
    rank: Rank,
    clip_job: ClipJob,
    pipe: build.Pipeline,
    clip: ClipShape,
    e: Entrant,
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
        e.seen.comm_ratio = 1 - attention_ms / whole_ms
        return made
    if rank.device.type == "cuda":
        e.seen.peak_bytes = max(e.seen.peak_bytes, torch.cuda.max_memory_allocated(rank.device))
    e.seen.totals_ms.append(breakdown.total_ms)
    e.seen.parts_ms.append(breakdown.parts())
    e.seen.steps_ms.append(breakdown.by_step())
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


def _compare(seen: Seen, made: _Made, expected: _Made) -> None:
    for ours, theirs in zip(made.latents, expected.latents, strict=True):
        seen.compare(ours, theirs)
    seen.frames_equal = seen.frames_equal is not False and bool(np.array_equal(made.frames, expected.frames))


def _note_clip(folder: Path, clip: ClipShape, e: Entrant, iteration: int, seed: int) -> None:
    """Append the first rank's view of a clip to clips.jsonl, so that a run that dies keeps what it measured."""
    line = {
        "num_frames": clip.frames,
        "method": e.case.method,
        "cut": e.case.cut,
        "clip": iteration,
        "seed": seed,
        "total_ms": e.seen.totals_ms[-1],
        "parts_ms": e.seen.parts_ms[-1],
        "steps_ms": e.seen.steps_ms[-1],
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
