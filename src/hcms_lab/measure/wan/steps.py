"""Denoising steps on ranks: methods interleaved step by step in one process, each timed, broken down and compared.

A clip of a 14 B model takes minutes a method, and all of its steps are alike. So one expert is built (all have one
shape), some or all of its layers (they are alike, too), and every method makes each round's step from the same latents,
timestep and prompts; text encoder and VAE are measured once before. Whole clips are composed of these parts
(`ClipRecord` says how), and say so. A step takes a second or more, far longer than a GPU's clock needs to settle, and
the next method's follows: the load is a sustained one.

Over a ghost link peers are memory. They hold one set of shards for all layers, laid down before every step, which
costs one untimed call: each layer then exchanges what it has for what they hold, and methods must agree bitwise. As
peers that hold the same in every layer are no peers of the ring, which computes with their keys what others get back
computed, the ring is compared where peers answer what they are asked: in an untimed step before, as all methods are,
and in single calls on the laid shards, before and after the timed steps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from hcms.clip import ClipShape
from hcms.diffusers import parallelize, restore
from hcms.links import links
from hcms_lab.ground.records import RecordFile
from hcms_lab.measure.cases import Point
from hcms_lab.measure.job import SUSTAINED
from hcms_lab.measure.launch import Rank
from hcms_lab.measure.link import settle
from hcms_lab.measure.sensors import Sensors
from hcms_lab.measure.wan import build
from hcms_lab.measure.wan.breakdown import DENOISING, Breakdown
from hcms_lab.measure.wan.clip_job import TOLERANCE, ClipJob, Entrant, entrant, largest_error
from hcms_lab.measure.wan.clip_records import mark_composed, recorded
from hcms_lab.measure.wan.denoising import Denoising, Moment
from hcms_lab.measure.wan.ends import ends_ms, freed
from hcms_lab.measure.wire import wire

_ALONE = 5  # calls of the attention layer by itself


def measure_steps(rank: Rank, clip_job: ClipJob, tick: Callable[[str], None]) -> None:
    """Measure all lengths on this rank; the first rank writes records, step by step and a method each."""
    folder = Path(clip_job.job.folder)
    ends = ends_ms(rank, clip_job)
    transformer = {**clip_job.model.transformer, "num_layers": clip_job.layers_timed}
    built = replace(clip_job.model, transformer=transformer)
    expert = build.random_expert(built, rank.device, clip_job.job.seed, sharding=clip_job.sharding)
    gbps_of_ratio = dict(clip_job.job.gbps_of_ratio)
    records = RecordFile(folder / "records.jsonl")
    for point, clip, clip_ends in zip(clip_job.points, clip_job.clips, ends, strict=True):
        bench = _Bench(rank, clip_job, point, clip, clip_ends, expert)
        gbps = settle(rank, clip_job.job, point, gbps_of_ratio)
        bench.run(tick)
        mark = partial(mark_composed, clip_job, SUSTAINED if rank.device.type == "cuda" else None)
        found = recorded(rank, clip_job, point, clip, gbps, bench.entrants, mark)
        if rank.first:
            records.append(list(found))
        del bench
        freed(rank.device)


class _Bench:
    """The rounds of one length on this rank."""

    def __init__(
        self,
        rank: Rank,
        clip_job: ClipJob,
        point: Point,
        clip: ClipShape,
        ends: dict[str, float],
        expert: torch.nn.Module,
    ) -> None:
        self.rank, self.clip_job, self.job, self.clip, self.ends = rank, clip_job, clip_job.job, clip, ends
        self.expert, self.ghost = expert, links()[self.job.link].one_for_all
        self.denoising = Denoising(clip_job.model, clip, expert, rank.device, self.job.seed)
        self.breakdown, self.sensors = Breakdown(rank.device), Sensors(rank.device)
        self.wire = wire(self.job.link, point)
        self.entrants = [entrant(case, point, self.job) for case in point.cases]
        self.ulysses = next(e for e in self.entrants if e.case.method == "ulysses")
        # Of the model, for each that is timed.
        self.blocks = int(clip_job.model.transformer["num_layers"]) / clip_job.layers_timed
        generator = torch.Generator(rank.device).manual_seed(self.job.seed)
        size = (1, clip.tokens // rank.ranks, point.heads, point.head_dim)
        # Of the attention layer alone: q, k, v `[1, L, N, H]`; over a ghost link, what peers hold.
        self.shards = [
            torch.randn(size, generator=generator, device=rank.device).to(getattr(torch, clip_job.model.dtype))
            for _ in "qkv"
        ]
        self._now, self._asking = self.ulysses, False  # who runs in the transformer, and how peers answer
        self._timed = False
        self._attention_ms = self._whole_ms = 0.0

    @torch.no_grad()
    def run(self, tick: Callable[[str], None]) -> None:
        title = f"{self.clip.frames} frames, {self.clip.tokens:,} tokens"

        def said(what: str) -> None:
            if self.rank.first:
                tick(f"{title}: {what}")

        moment = self.denoising.first()
        plain = self._plain(moment) if self.clip_job.compare_plain else None
        for e in self.entrants:
            e.attention.layer(*self.shards)  # buffers, and an automatic plan, outside of the transformer
        parallelize(self.expert, attention=self.breakdown.attention(self._attend))
        try:
            moment = self._asked(moment, plain, said)
            self._check_layers()
            rounds = self.job.warmup + self.job.iterations
            for index in range(rounds):
                if index == self.job.warmup:
                    self._ratios(moment)
                order = self.entrants.copy()
                random.Random(self.job.seed * 100_003 + index).shuffle(order)
                timed = index - self.job.warmup
                self._timed = timed >= 0
                latents: dict[int, Tensor] = {}
                at_ulysses = moment
                for e in order:
                    at = moment.again()
                    self.wire.lay(partial(self._eager, e, *self.shards))
                    latents[id(e)] = self._step(e, at)
                    if e is self.ulysses:
                        at_ulysses = at
                    if timed >= 0:
                        self._note(e, timed, at.step)
                        said(f"step {timed + 1}, {e.case.method}")
                expected = latents[id(self.ulysses)]
                for e in self.entrants:
                    if not (self.ghost and e.case.method == "ring"):
                        e.seen.compare(latents[id(e)], expected)
                moment = self.denoising.next(at_ulysses, expected)
            self._check_layers()
        finally:
            restore(self.expert)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _step(self, e: Entrant, at: Moment) -> Tensor:
        """One step of one method, after a barrier; its times are in `breakdown`."""
        self._now = e
        e.attention.poison()
        if self.rank.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.rank.device)
        dist.barrier(self.rank.control)
        self.breakdown.clear()
        with (
            self.sensors.watch() as self._sensed,
            self.breakdown.watching(transformers=[self.expert]),
            self.breakdown.clip(),
        ):
            return self.denoising.step(at, self.breakdown)

    def _attend(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        """The method whose turn it is, in a layer of the transformer."""
        attention, seen = self._now.attention, self._now.seen
        if self._asking:
            return self.wire.ask(partial(self._eager, self._now, q_BLNH, k_BLNH, v_BLNH))
        self.wire.rewind()
        out_BLNH = attention(q_BLNH, k_BLNH, v_BLNH)
        self.wire.answer()
        if self._timed:
            seen.calls += 1
            seen.replayed += attention.replayed
        if attention.timeline is not None:
            self._attention_ms += attention.timeline.attention_ms
            self._whole_ms += attention.timeline.duration_ms
        return out_BLNH

    @staticmethod
    def _eager(e: Entrant, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        """A call that no graph makes: it leaves a timeline."""
        e.attention.record_timeline = True
        try:
            return e.attention(q_BLNH, k_BLNH, v_BLNH)
        finally:
            e.attention.record_timeline = False

    def _note(self, e: Entrant, index: int, step: int) -> None:
        """Compose a clip of the step that was just made, and keep the first rank's view of it in steps.jsonl."""
        seen, steps = e.seen, self.clip_job.model.steps
        timed, parts = self.breakdown.parts(), self.breakdown.parts(blocks=self.blocks)
        whole = {name: steps * ms + self.ends.get(name, 0.0) for name, ms in parts.items()}
        seen.totals_ms.append(sum(whole.values()))
        seen.parts_ms.append(whole)
        seen.steps_ms.append([{name: parts[name] for name in (*DENOISING, "other")}])
        seen.host_ms.append(self.breakdown.issued_ms)
        # The scheduler waits for the device, so the host's lead is what there was before it.
        forwards_ms = self.breakdown.total_ms - timed["scheduler"]
        seen.ahead_ms.append(forwards_ms - self.breakdown.issued_ms)
        seen.sensors.append(dict(self._sensed))
        if self.rank.device.type == "cuda":
            seen.peak_bytes = max(seen.peak_bytes, torch.cuda.max_memory_allocated(self.rank.device))
        if self.rank.first:
            line = {
                "num_frames": self.clip.frames,
                "method": e.case.method,
                "cut": e.case.cut,
                "round": index,
                "step": step,
                "step_ms": self.breakdown.total_ms,
                "layers_timed": self.clip_job.layers_timed,
                "host_ms": seen.host_ms[-1],
                "parts_ms": timed,
                **self._sensed,
            }
            with (Path(self.job.folder) / "steps.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    # ---- outside of the timed steps ----------------------------------------------------------------------------------

    def _plain(self, moment: Moment) -> Tensor:
        """The same step by the unchanged transformer on this rank alone."""
        self.breakdown.clear()
        return self.denoising.step(moment.again(), self.breakdown)

    def _asked(self, moment: Moment, plain: Tensor | None, said: Callable[[str], None]) -> Moment:
        """A step of every method in which peers answer what they are asked, compared; returns the next moment."""
        latents: dict[int, Tensor] = {}
        at_ulysses, self._asking = moment, True
        for e in self.entrants:
            at = moment.again()
            latents[id(e)] = self._step(e, at)
            at_ulysses = at if e is self.ulysses else at_ulysses
            said(f"warm-up, {e.case.method}")
        self._asking = False
        expected = latents[id(self.ulysses)]
        for e in self.entrants:
            e.seen.compare(latents[id(e)], expected)
            if plain is not None:
                e.seen.compare_plain(latents[id(e)], plain)
        return self.denoising.next(at_ulysses, expected)

    def _check_layers(self) -> None:
        """One call of every method on the shards, as steps make it: its output, and what left, must be right."""
        expected: Tensor | None = None
        for e in sorted(self.entrants, key=lambda e: e is not self.ulysses):
            self.wire.lay(partial(self._eager, e, *self.shards))
            e.attention.poison()
            self.wire.spoil()
            self.wire.rewind()
            out = e.attention(*self.shards)
            e.seen.wrong_bytes = max(e.seen.wrong_bytes, self.wire.wrong_bytes())
            if expected is None:
                expected = out
            exact = e.case.method != "ring"
            off = largest_error(out, expected) / expected.abs().max().item()
            if not torch.equal(out, expected) if exact else off > TOLERANCE[self.clip_job.model.dtype]:
                e.seen.wrong = f"a single call is {off:.3g} of the largest output away from ulysses"

    def _ratios(self, moment: Moment) -> None:
        """The communication ratio of serial Ulysses: in the transformer, and of the attention layer alone."""
        e = self.ulysses
        self.wire.lay(partial(self._eager, e, *self.shards))
        alone = []
        for _ in range(_ALONE):
            self.wire.rewind()
            self._eager(e, *self.shards)
            assert e.attention.timeline is not None
            alone.append(1 - e.attention.timeline.attention_ms / e.attention.timeline.duration_ms)
        e.seen.layer_comm_ratio = median(alone[1:])
        self._attention_ms = self._whole_ms = 0.0
        e.attention.record_timeline = True
        try:
            self._step(e, moment.again())
        finally:
            e.attention.record_timeline = False
        e.seen.comm_ratio = 1 - self._attention_ms / self._whole_ms
