"""What users change on a pipeline beside `hcms.parallelize` comes out right on all ranks, or is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import hcms
from ranks import Place, on_ranks
from tiny_wan import TRANSFORMER, clip, diffusers, expert, parallel, pipeline, run, said

pytestmark = pytest.mark.t1

dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
WanAttnProcessor = pytest.importorskip("diffusers.models.transformers.transformer_wan").WanAttnProcessor


@contextmanager
def own_backends() -> Iterator[None]:
    """diffusers' active backend is one for a process, which other tests share."""
    before = dispatch._AttentionBackendRegistry._active_backend
    try:
        yield
    finally:
        dispatch._AttentionBackendRegistry.set_active_backend(before)


# A processor that is replaced


def replaced(place: Place) -> dict[str, Any]:
    model = expert()
    alone = run(model)
    found: dict[str, Any] = {}
    with parallel(model, place):
        module = model.blocks[1].attn1
        kept, module.processor = module.processor, WanAttnProcessor()
        found["one"] = said(lambda: run(model))
        module.processor = kept
        found["put back"] = torch.equal(run(model), alone)
        model.blocks[0].attn2.set_processor(WanAttnProcessor())
        found["cross-attention"] = said(lambda: run(model))
    with parallel(model, place):
        model.set_attn_processor(WanAttnProcessor())
        found["all"] = said(lambda: run(model))
    with parallel(model, place):
        model.blocks[0].attn1.processor._parallel_config = None
        found["taken over"] = said(lambda: run(model))
    with parallel(model, place):
        kept, model.blocks[1] = model.blocks[1], expert().blocks[1]
        found["block"] = said(lambda: run(model))
        model.blocks[1] = kept
    found["restored"] = torch.equal(run(model), alone)
    return found


def test_a_processor_replaced_later_is_refused_with_its_module_s_name():
    for found in on_ranks(2, replaced):
        assert found["put back"] and found["restored"]
        assert (
            "RuntimeError: WanTransformer3DModel: the attention processor of blocks.1.attn1 was replaced by "
            "WanAttnProcessor after hcms.parallelize()"
        ) in found["one"]
        assert "blocks.0.attn2 was replaced" in found["cross-attention"]
        assert "blocks.0.attn1 was replaced" in found["all"]
        assert "enable_parallelism() took over blocks.0.attn1" in found["taken over"]
        assert "blocks.1.attn1 was replaced after hcms.parallelize()" in found["block"]


# Noise that a scheduler draws


def drawn(place: Place, kind: str, when: str, seeded: bool) -> dict[str, Any]:
    """A clip by a stochastic scheduler: what this rank makes alone and what ranks make together, of its seed."""
    schedulers = {
        "global generator": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True),
        "its own generator": lambda: diffusers.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
    }
    pipe = pipeline()
    kept = pipe.scheduler
    try:
        if when == "before":
            pipe.scheduler = schedulers[kind]()
        else:
            hcms.parallelize(pipe, place.gloo, plan="even:2")
            pipe.scheduler = schedulers[kind]()
        together: list[torch.Tensor] = []
        for _ in range(2):
            if when == "before" and not together:
                hcms.parallelize(pipe, place.gloo, plan="even:2")
            torch.manual_seed(place.rank)
            together.append(clip(pipe, seed=place.rank if seeded else None, steps=3))
        hcms.restore(pipe)
        torch.manual_seed(place.rank)
        alone = clip(pipe, seed=place.rank if seeded else None, steps=3)
        return {"alone": alone, "together": together, "left over": "step" in pipe.scheduler.__dict__}
    finally:
        pipe.scheduler = kept


@pytest.mark.parametrize("kind", ["global generator", "its own generator"])
@pytest.mark.parametrize(("when", "seeded"), [("before", False), ("after", False), ("after", True)])
def test_a_stochastic_scheduler_draws_the_first_rank_s_noise(kind, when, seeded):
    first, second = on_ranks(2, drawn, kind, when, seeded)
    assert not torch.equal(first["alone"], second["alone"])  # ranks' own draws differ
    for made in (*first["together"], *second["together"]):
        assert torch.equal(made, first["alone"])
    assert not first["left over"]


def given_latents(place: Place) -> dict[str, bool]:
    pipe = pipeline()
    own = torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(place.rank))
    kept = own.clone()
    with parallel(pipe, place):
        pipe(prompt="a cat", latents=own, num_inference_steps=1, max_sequence_length=16, output_type="latent",
             height=32, width=48, num_frames=9)  # fmt: skip
    return {"kept": torch.equal(own, kept)}


def test_latents_of_the_user_s_stay_as_they_are():
    for found in on_ranks(2, given_latents):
        assert found["kept"]


# Attention backends


def backends_before(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with own_backends():
        model = expert()
        model.set_attention_backend("_native_math")
        alone = run(model)
        with parallel(model, place):
            found["math"] = (run(model) - alone).abs().max().item()
            found["math by"] = kernel_of(model)
        with parallel(model, place, kernel="sdpa"):
            run(model)
            found["asked for sdpa"] = kernel_of(model)
        model.set_attention_backend("flex")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with parallel(model, place):
                found["instead of flex"] = kernel_of(model)
        found["warned"] = [str(w.message) for w in caught if "hcms" in str(w.message)]
        model.blocks[0].attn1.set_attention_backend("native")
        found["mixed"] = said(lambda: hcms.parallelize(model, place.gloo))
        found["left as it was"] = not hasattr(model, "_hcms")
        model.set_attention_backend("_native_math")
        found["ring"] = said(lambda: hcms.parallelize(model, place.gloo, method="ring", kernel="sage"))
    return found


def kernel_of(model: Any) -> str:
    return model.blocks[0].attn1.processor._parallel_config.attention.kernel.name


def test_a_pipeline_s_own_backend_is_taken_over_or_a_warning_says_what_replaces_it():
    for rank, found in enumerate(on_ranks(2, backends_before)):
        assert found["math"] < 1e-5
        assert (found["math by"], found["asked for sdpa"], found["instead of flex"]) == ("math", "sdpa", "sdpa")
        assert len(found["warned"]) == (rank == 0)  # once, not once a rank
        assert all("no kernel for the attention backend 'flex'; 'sdpa' takes its place" in w for w in found["warned"])
        assert "blocks.0.attn1: native, blocks.0.attn2: flex" in found["mixed"]
        assert found["left as it was"]
        assert "ring needs a kernel that gives its log-sum-exp" in found["ring"]


def backends_after(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with own_backends():
        model = expert()
        sdpa = run(model)
        model.set_attention_backend("_native_flash")
        flash = run(model)
        model.reset_attention_backend()
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)
        with parallel(model, place):
            found["first"] = torch.equal(run(model), sdpa)
            model.set_attention_backend("_native_flash")
            found["taken over"] = torch.equal(run(model), flash)
            found["by"] = kernel_of(model)
            found["still set"] = {str(m.processor._attention_backend.value) for m in model.modules()
                                  if hasattr(m, "processor")}  # fmt: skip
            model.reset_attention_backend()
            model.set_attention_backend("native")
            found["and back"] = torch.equal(run(model), sdpa)
            found["diffusers'"] = said(lambda: model.set_attention_backend("flex"))
            for module in model.modules():
                if hasattr(module, "processor"):
                    module.processor._attention_backend = dispatch.AttentionBackendName.FLEX
            found["unknown"] = said(lambda: run(model))
        with parallel(model, place, kernel="math"):
            run(model)
            found["asked"] = kernel_of(model)
            model.set_attention_backend("native")
            run(model)
            found["asked, then set"] = kernel_of(model)
        own = hcms.SequenceParallelAttention(place.gloo, "ulysses")
        hcms.parallelize(model, place.gloo, attention=own)
        run(model)
        model.set_attention_backend("_native_flash")
        found["fixed"] = said(lambda: run(model))
        hcms.restore(model)
        found["active again"] = dispatch._AttentionBackendRegistry._active_backend.value
    return found


def test_a_backend_set_later_is_taken_over_or_refused_in_one_line():
    for found in on_ranks(2, backends_after):
        assert found["first"] and found["taken over"] and found["and back"]
        assert found["by"] == "sdpa-flash"
        assert found["still set"] == {"_native_flash"}
        assert found["diffusers'"].startswith("ValueError: Context parallelism is enabled but")
        assert (
            "'flex' was set after hcms.parallelize(), and hcms has no kernel for it: set one of native,"
            in (found["unknown"])
        )
        assert (found["asked"], found["asked, then set"]) == ("math", "sdpa")
        assert "'_native_flash' was set after hcms.parallelize(attention=...)" in found["fixed"]
        assert found["active again"] == "_native_flash"
        assert all("\n" not in line for line in found.values() if isinstance(line, str))


def options(place: Place) -> dict[str, Any]:
    model = expert()
    own = hcms.SequenceParallelAttention(place.gloo)
    found: dict[str, Any] = {
        "both": said(lambda: hcms.parallelize(model, place.gloo, attention=own, kernel="math", prefetch=2)),
        "unknown": "nothing",
    }
    try:
        hcms.parallelize(model, place.gloo, prefetsch=2)
    except TypeError as error:
        found["unknown"] = str(error)
    with parallel(model, place, plan="even:4", prefetch=3, record_timeline=True):
        run(model)
        attention = model.blocks[0].attn1.processor._parallel_config.attention
        found["passed on"] = attention.timeline is not None and attention._order["prefetch"] == 3
    return found


def test_options_reach_the_attention_object():
    for found in on_ranks(2, options):
        assert "kernel=, prefetch= would say nothing" in found["both"]
        assert "prefetsch" in found["unknown"]
        assert found["passed on"]


# Autocast and dtypes


def autocast(place: Place) -> dict[str, Any]:
    model = expert()
    exact = run(model)
    for block in model.blocks:  # in float32 under autocast, as CUDA's are: queries and keys differ from values
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.register_forward_hook(lambda _module, _args, output: output.float())
    with torch.autocast("cpu", torch.bfloat16):
        alone = run(model)
    found: dict[str, Any] = {"dtype": str(alone.dtype), "rounding": (alone - exact).abs().max().item()}
    for method in ("ulysses", "hcms", "ring"):
        with parallel(model, place, method=method), torch.autocast("cpu", torch.bfloat16):
            ours = run(model)
        found[method] = (ours.dtype == alone.dtype, (ours - alone).abs().max().item())
    model.blocks[0].attn1.norm_q.register_forward_hook(lambda _module, _args, output: output.to(torch.bfloat16))
    with parallel(model, place):
        found["mixed"] = said(lambda: run(model))
    return found


def test_autocast_gives_what_it_gives_on_one_process():
    for found in on_ranks(2, autocast):
        for method in ("ulysses", "hcms", "ring"):
            same_dtype, off = found[method]
            assert same_dtype
            assert off <= found["rounding"]  # a row of a bfloat16 product may depend on how many stand beside it
        assert "q, k and v must share dtype and device" in found["mixed"]


# An interrupt


def interrupted(place: Place) -> dict[str, Any]:
    """An interrupt leaves torch no chance to call hooks: the next run must start clean, and other models must work."""
    model, other = expert(), diffusers.WanTransformer3DModel(**TRANSFORMER).eval()
    alone, other_alone = run(model), run(other)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with parallel(model, place):
        handle = model.blocks[1].register_forward_pre_hook(stop)
        try:
            run(model)
        except KeyboardInterrupt:
            handle.remove()
        found = {"other": torch.equal(run(other), other_alone), "again": torch.equal(run(model), alone)}
    found["clean"] = all(isinstance(key, dispatch.AttentionBackendName) for key in
                         (*dispatch._AttentionBackendRegistry._backends, dispatch._AttentionBackendRegistry._active_backend))  # fmt: skip  # noqa: E501
    return found


def test_an_interrupted_run_leaves_nothing_behind():
    for found in on_ranks(2, interrupted):
        assert found == dict.fromkeys(found, True)
