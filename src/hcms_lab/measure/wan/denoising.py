"""Denoising steps as the pipeline makes them, one at a time; where each starts from is kept, to start from again."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hcms.clip import ClipShape
from hcms_lab.ground.model_config import ModelConfig
from hcms_lab.measure.wan import build
from hcms_lab.measure.wan.breakdown import Breakdown
from hcms_lab.measure.wan.ends import latents_size


@dataclass(frozen=True)
class Moment:
    """What a step starts from. Solvers of several steps remember earlier ones, so the scheduler is part of it.

    Args:
        step: of the clip, from 0.
        latents: `[1, C, T, rows, columns]`, float32.
        condition: more channels of the input, of a clip that starts from a picture; None has none.
        prompts: embeddings `[1, text tokens, text width]`, of the prompt and, with guidance, of the negative one.
    """

    step: int
    latents: Tensor
    condition: Tensor | None
    prompts: tuple[Tensor, ...]
    scheduler: Any

    def again(self) -> Moment:
        """The same, to be stepped from without touching this one."""
        return replace(self, scheduler=deepcopy(self.scheduler))


class Denoising:
    """The steps of one clip after another, each round's from where the last one led, with new prompts every round.

    Args:
        guidance: 1 runs the transformer once a step, more runs it twice.
    """

    def __init__(self, model: ModelConfig, clip: ClipShape, expert: nn.Module, device: torch.device, seed: int) -> None:
        self._model, self._clip, self._expert, self._device, self._seed = model, clip, expert, device, seed
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._rounds = 0

    def first(self) -> Moment:
        """A new clip's."""
        scheduler = build.scheduler(self._model)
        scheduler.set_timesteps(self._model.steps, device=self._device)
        scheduler.set_begin_index(0)
        channels = int(self._model.transformer["out_channels"])
        more = int(self._model.transformer["in_channels"]) - channels
        generator = self._generator()
        latents = self._noise(generator, latents_size(self._clip, channels))
        condition = self._noise(generator, latents_size(self._clip, more)) if more else None
        return Moment(0, latents, condition, self._prompts(), scheduler)

    def next(self, moment: Moment, latents: Tensor) -> Moment:
        """Where a step led that was made from `moment`, whose scheduler has seen it; at a clip's end a new clip's."""
        if moment.step + 1 == self._model.steps:
            return self.first()
        return replace(moment, step=moment.step + 1, latents=latents, prompts=self._prompts())

    @torch.no_grad()
    def step(self, moment: Moment, breakdown: Breakdown) -> Tensor:
        """The latents after a step, as `WanPipeline.__call__` makes it."""
        latents, t = moment.latents, moment.scheduler.timesteps[moment.step]
        given = latents if moment.condition is None else torch.cat([latents, moment.condition], dim=1)
        given = given.to(self._dtype)
        # A timestep a token (TI2V), or one for all.
        timestep = t.float().expand(1, self._clip.tokens) if self._model.expand_timesteps else t.expand(1)
        noise, *negative = (
            self._expert(hidden_states=given, timestep=timestep, encoder_hidden_states=prompt, return_dict=False)[0]
            for prompt in moment.prompts
        )
        if negative:
            noise = negative[0] + self._model.guidance * (noise - negative[0])
        breakdown.issued()
        with breakdown.span("scheduler"):
            return moment.scheduler.step(noise, t, latents, return_dict=False)[0]

    def _prompts(self) -> tuple[Tensor, ...]:
        size = (1, self._model.text_tokens, int(self._model.transformer["text_dim"]))
        generator = self._generator()
        count = 2 if self._model.guidance > 1 else 1
        return tuple(self._noise(generator, size).to(self._dtype) for _ in range(count))

    def _generator(self) -> torch.Generator:
        self._rounds += 1
        return torch.Generator(self._device).manual_seed(self._seed * 100_003 + self._rounds)

    def _noise(self, generator: torch.Generator, size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, device=self._device, dtype=torch.float32)
