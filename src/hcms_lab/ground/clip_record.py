"""What is recorded of whole clips: a method's time, where it went, and how that compares with `ulysses`. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hcms.clip import ClipShape
from hcms_lab.ground.model_config import ModelConfig
from hcms_lab.ground.records import Record

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)  # per cent


@dataclass(kw_only=True)
class ClipRecord(Record):
    """A method's clips of one length. `latency_ms` is the median clip, `<part>_ms` its parts: they add up.

    `comm_ratio` is that of serial Ulysses inside the pipeline. `frames` counts latent frames, as everywhere.

    Where `composed`, no whole clip ran: each of `times_ms` is one timed denoising step (a round, in which every method
    makes the same step) times `steps`, and the text encoder and the VAE, measured once each. All experts are taken to
    be like the one that was timed, and all layers like the `layers_timed` that were; what a pipeline does
    around these, such as frames to pixels, is left out.
    """

    weights: str
    sharding: str
    num_frames: int
    width: int
    height: int
    steps: int
    guidance: float
    guidance_2: float | None
    flow_shift: float
    experts: int
    layers: int
    text_encoder_ms: float | None = None
    self_attention_ms: float | None = None
    self_projections_ms: float | None = None
    cross_attention_ms: float | None = None
    feed_forward_ms: float | None = None
    transformer_rest_ms: float | None = None
    scheduler_ms: float | None = None
    vae_encode_ms: float | None = None
    vae_decode_ms: float | None = None
    other_ms: float | None = None
    named_share: float | None = None  # of the clip, of all parts but `other`
    self_attention_share: float | None = None
    self_attention_times_ms: list[float] | None = None  # a clip each, as times_ms
    attention_layer_times_ms: list[float] | None = None  # with the projections around it
    step_times_ms: list[float] | None = None  # median of each denoising step, over the clips; composed: each timed step
    self_attention_by_step_ms: list[float] | None = None
    attention_speedup_vs_ulysses: float | None = None
    attention_speedup_interval: list[float] | None = None
    layer_speedup_vs_ulysses: float | None = None
    speedup_interval: list[float] | None = None
    amdahl_speedup: float | None = None  # of the clip, from the attention's speedup and its share under ulysses
    amdahl_agrees: bool | None = None  # it lies in speedup_interval
    latents_equal: bool | None = None  # after every step, bitwise, with ulysses
    frames_equal: bool | None = None  # at the end
    plain_max_abs_err: float | None = None  # of the last latents, against the unchanged pipeline on one rank
    plain_bitwise_equal: bool | None = None
    composed: bool = False
    steps_timed: int | None = None
    layers_timed: int | None = None  # transformer blocks, of `layers`
    experts_timed: int | None = None  # of `experts`
    forwards_a_step: int | None = None
    layer_comm_ratio: float | None = None  # as comm_ratio, of the attention layer alone
    host_ahead_ms: float | None = None  # work that the device still had to do when a step's forwards were issued: least
    replayed_share: float | None = None  # of the attention calls in timed steps, by CUDA graphs
    wrong_bytes: int | None = None  # of those that left, as far as the link can tell
    assumed: list[str] | None = None  # by a prediction


def of_clip(model: ModelConfig, clip: ClipShape) -> dict[str, Any]:
    """The fields of a record that say which clip is made, and of which model."""
    return {
        "frames": clip.latent_frames,
        "num_frames": clip.frames,
        "width": clip.width,
        "height": clip.height,
        "steps": model.steps,
        "guidance": model.guidance,
        "guidance_2": model.guidance_2,
        "flow_shift": model.flow_shift,
        "experts": model.experts,
        "layers": int(model.transformer["num_layers"]),
    }


def against_ulysses(records: list[ClipRecord], seed: int) -> None:
    """Fill in each record's speedups over `ulysses`, with intervals, and what Amdahl's law makes of them.

    Intervals are 95 % bootstrap intervals of the ratio of medians, over rounds: a round's clips stay together, so that
    drift, which hits them all, does not widen them.
    """
    base = next((r for r in records if r.method == "ulysses"), None)
    ring = next((r for r in records if r.method == "ring"), None)
    if base is None:
        return
    assert base.times_ms and base.self_attention_times_ms and base.attention_layer_times_ms
    rounds = len(base.times_ms)
    picks = np.random.default_rng(seed).integers(0, rounds, size=(RESAMPLES, rounds))

    def speedup(reference: list[float], ours: list[float]) -> tuple[float, list[float]]:
        a, b = np.asarray(reference), np.asarray(ours)
        resampled = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
        return float(np.median(a) / np.median(b)), [float(x) for x in np.percentile(resampled, INTERVAL)]

    for r in records:
        assert r.times_ms and r.self_attention_times_ms and r.attention_layer_times_ms
        r.comm_ratio = base.comm_ratio
        r.speedup_vs_ulysses, r.speedup_interval = speedup(base.times_ms, r.times_ms)
        if ring is not None and ring.times_ms:
            r.speedup_vs_ring = speedup(ring.times_ms, r.times_ms)[0]
        r.attention_speedup_vs_ulysses, r.attention_speedup_interval = speedup(
            base.self_attention_times_ms, r.self_attention_times_ms
        )
        r.layer_speedup_vs_ulysses = speedup(base.attention_layer_times_ms, r.attention_layer_times_ms)[0]
        share = base.self_attention_share
        assert share is not None
        r.amdahl_speedup = 1 / (1 - share + share / r.attention_speedup_vs_ulysses)
        r.amdahl_agrees = bool(r.speedup_interval[0] <= r.amdahl_speedup <= r.speedup_interval[1])
