"""diffusers' caches skip the same layers on all ranks as on one process, or are refused by name; none hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hcms
from ranks import Place, on_ranks
from tiny_wan import clip, pipeline, tiny

pytestmark = pytest.mark.t1

hooks = pytest.importorskip("diffusers.hooks")
first_block = pytest.importorskip("diffusers.hooks.first_block_cache")
STEPS = 4


def by_first_block(pipe: Any, threshold: float) -> Any:
    return hooks.FirstBlockCacheConfig(threshold=threshold)


def by_ratios(pipe: Any, _: float) -> Any:
    ratios = [1.0, 0.99, 0.98, 0.99]
    return hooks.MagCacheConfig(threshold=0.1, num_inference_steps=STEPS, mag_ratios=ratios)


def by_taylor(pipe: Any, _: float) -> Any:
    return hooks.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1"],
    )


def by_pyramid(pipe: Any, _: float) -> Any:
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


Config = Callable[[Any, float], Any]
EXPERTS = ("transformer", "transformer_2")


def enable(pipe: Any, config: Config, threshold: float) -> None:
    for name in EXPERTS:
        getattr(pipe, name).enable_cache(config(pipe, threshold))


def disable(pipe: Any) -> None:
    for name in EXPERTS:
        getattr(pipe, name).disable_cache()


def dividing_threshold(pipe: Any, steps: int) -> float:
    """A threshold of FirstBlockCache at whose first decision two ranks would differ, each by its half of the tokens,
    and the whole would skip. Later decisions hang on that one, so they tell nothing beforehand.
    """
    seen: list[list[float]] = []
    original = first_block.FBCHeadBlockHook._should_compute_remaining_blocks

    def spy(self: Any, residual: torch.Tensor) -> bool:
        last = self.state_manager.get_state().head_block_residual
        if last is not None:
            pairs = [(residual, last), *zip(residual.chunk(2, dim=1), last.chunk(2, dim=1), strict=True)]
            seen.append([((now - then).abs().mean() / then.abs().mean()).item() for now, then in pairs])
        return original(self, residual)

    first_block.FBCHeadBlockHook._should_compute_remaining_blocks = spy
    try:
        enable(pipe, by_first_block, 0.0)
        clip(pipe, steps=steps)
        disable(pipe)
    finally:
        first_block.FBCHeadBlockHook._should_compute_remaining_blocks = original
    whole, *halves = seen[0]
    threshold = (whole + max(halves)) / 2
    assert min(halves) < whole < threshold < max(halves)
    return threshold


def cached(place: Place, config: Config, threshold: float, when: str) -> dict[str, Any]:
    pipe = pipeline()
    plain = clip(pipe, steps=STEPS)
    enable(pipe, config, threshold)
    alone = clip(pipe, steps=STEPS)
    found = {"skipped": not torch.equal(alone, plain)}
    if when == "after":
        disable(pipe)
    hcms.parallelize(pipe, place.gloo, plan="even:2")
    if when == "after":
        enable(pipe, config, threshold)
    found["first"] = torch.equal(clip(pipe, steps=STEPS), alone)
    found["again"] = torch.equal(clip(pipe, steps=STEPS), alone)
    if when == "after":
        hcms.restore(pipe)
        found["restored"] = torch.equal(clip(pipe, steps=STEPS), alone)
        disable(pipe)
    else:
        disable(pipe)
        found["disabled"] = torch.equal(clip(pipe, steps=STEPS), plain)
        hcms.restore(pipe)
    found["as it was"] = torch.equal(clip(pipe, steps=STEPS), plain)
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("config", [by_first_block, by_ratios, by_taylor, by_pyramid])
def test_a_cache_skips_on_ranks_what_it_skips_on_one_process(config, when):
    threshold = dividing_threshold(pipeline(), STEPS) if config is by_first_block else 0.0
    for found in on_ranks(2, cached, config, threshold, when):
        assert found == dict.fromkeys(found, True)


def faster(place: Place) -> dict[str, Any]:
    """FasterCache wants both guidance branches in one batch, which Wan's pipeline does not make: a bare transformer."""
    from hcms_lab.measure.wan.build import random_pipeline

    model = random_pipeline(tiny(experts=1), torch.device("cpu")).transformer
    timestep = 1000

    def steps() -> torch.Tensor:
        nonlocal timestep
        model._reset_stateful_cache()
        made = []
        for timestep in (900, 800, 700, 600):
            inputs = {
                "hidden_states": torch.randn(2, 16, 3, 8, 12, generator=torch.Generator().manual_seed(timestep)),
                "timestep": torch.tensor([timestep, timestep]),
                "encoder_hidden_states": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2)),
            }
            with torch.no_grad(), model.cache_context("both"):
                made.append(model(**inputs).sample)
        return torch.stack(made)

    plain = steps()
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: timestep,
        tensor_format="BCFHW",
    )
    model.enable_cache(config)
    alone = steps()
    found = {"skipped": not torch.equal(alone, plain)}
    hcms.parallelize(model, place.gloo, plan="even:2")
    found["before"] = torch.equal(steps(), alone)
    model.disable_cache()
    found["without again"] = torch.equal(steps(), plain)
    model.enable_cache(config)
    found["after"] = torch.equal(steps(), alone)
    hcms.restore(model)
    found["restored"] = torch.equal(steps(), alone)
    return found


def test_faster_cache_skips_the_same_on_ranks():
    for found in on_ranks(2, faster):
        assert found == dict.fromkeys(found, True)


def refused(place: Place) -> dict[str, str]:
    pipe = pipeline()
    configs = {
        "sea": hooks.SeaCacheConfig(),
        "calibrating": hooks.MagCacheConfig(num_inference_steps=STEPS, calibrate=True),
    }
    found = {}
    for name, config in configs.items():
        for when in ("before", "after"):
            if when == "before":
                pipe.transformer.enable_cache(config)
            hcms.parallelize(pipe, place.gloo, plan="even:2")
            if when == "after":
                pipe.transformer.enable_cache(config)
            try:
                clip(pipe)
                found[f"{name}, {when}"] = "nothing"
            except ValueError as error:
                found[f"{name}, {when}"] = str(error)
            hcms.restore(pipe)
            pipe.transformer.disable_cache()
    return found


def test_caches_that_would_decide_differently_are_refused_by_name():
    for found in on_ranks(2, refused):
        for when in ("before", "after"):
            sea, calibrating = found[f"sea, {when}"], found[f"calibrating, {when}"]
            assert "WanTransformer3DModel cannot run in parallel with this cache: SeaCache decides" in sea
            assert "MagCache would calibrate on a part of the tokens" in calibrating


def cached_over_four(place: Place, threshold: float) -> dict[str, Any]:
    pipe = pipeline()
    enable(pipe, by_first_block, threshold)
    alone = clip(pipe, steps=3)
    hcms.parallelize(pipe, place.emulated, plan="even:2")
    same = torch.equal(clip(pipe, steps=3), alone)
    hcms.restore(pipe)
    disable(pipe)
    return {"same": same}


def test_the_decision_is_shared_by_four_ranks_on_the_emulated_link():
    for found in on_ranks(4, cached_over_four, dividing_threshold(pipeline(), steps=3)):
        assert found["same"]
