"""A tiny Wan pipeline on real ranks gives what it gives on one process: bitwise, as every row is computed alike.

Linear layers give each token the same bits whatever tokens stand beside it (checked by `test_rows...`, since it is the
BLAS's doing, not ours), so splitting tokens changes nothing; splitting heads does not, nor does chunking them. Ring
merges partial softmaxes, so it is only close.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ranks import Collectives, Place, on_ranks
from tiny_wan import TRANSFORMER, clip, diffusers, pipeline, tiny

pytestmark = pytest.mark.t1

RING_TOLERANCE = 1e-4  # of the largest latent, in float32


def parallel_clips(place: Place, kind: tuple[Any, ...], methods: list[tuple[str, str]], guidance: float) -> dict:
    """For each method: are the frames those of the unchanged pipeline on this rank alone, and how far are they off?"""
    import hcms

    pipe = pipeline(*kind)
    plain = clip(pipe, guidance=guidance)
    found = {"moved": plain.std().item()}
    for method, plan in methods:
        hcms.parallelize(pipe, place.emulated, method=method, plan=plan)
        ours = clip(pipe, guidance=guidance)
        hcms.restore(pipe)
        found[f"{method}/{plan}"] = torch.equal(ours, plain) or (ours - plain).abs().max().item()
    found["restored"] = torch.equal(clip(pipe, guidance=guidance), plain)
    return found


OURS = [("ulysses", "even:1"), ("hcms", "even:2"), ("hcms-3lane", "even:2"), ("ring", "even:1")]
KINDS = {
    "t2v": ("t2v", False, 2),
    "i2v": ("i2v", False, 2),
    "ti2v as t2v": ("t2v", True, 1),
    "ti2v as i2v": ("i2v", True, 1),
}


@pytest.mark.parametrize(("kind", "guidance"), [*((kind, 4.0) for kind in KINDS), ("t2v", 1.0)])
def test_two_ranks_give_the_frames_of_one(kind, guidance):
    for found in on_ranks(2, parallel_clips, KINDS[kind], OURS, guidance):
        assert found.pop("moved") > 0.01  # the frames hold something that could differ
        ring = found.pop("ring/even:1")
        assert ring is True or ring < RING_TOLERANCE
        assert found == dict.fromkeys(found, True)


def test_four_ranks_of_two_heads_give_the_frames_of_one():
    for found in on_ranks(4, parallel_clips, KINDS["t2v"], [("hcms", "1-1"), ("ulysses", "even:1")], 4.0):
        found.pop("moved")
        assert found == dict.fromkeys(found, True)


def one_rank_and_a_part(place: Place) -> dict[str, bool]:
    """A group of this rank alone; and the same pipeline over a transformer only, called as diffusers' users call it."""
    import hcms

    group = [dist.new_group([r], backend="gloo") for r in range(place.ranks)][place.rank]
    assert isinstance(group, dist.ProcessGroup)
    pipe = pipeline()
    plain = clip(pipe)
    hcms.parallelize(pipe, group, plan="even:2")
    found = {"one rank": torch.equal(clip(pipe), plain)}
    hcms.restore(pipe)
    inputs = {
        "hidden_states": torch.randn(2, 16, 3, 8, 12, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([900, 900]),
        "encoder_hidden_states": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2)),
    }
    with torch.no_grad():
        expected = pipe.transformer(**inputs).sample
        hcms.parallelize(pipe.transformer, place.gloo, plan="even:2")
        found["a bare transformer, batch 2"] = torch.equal(pipe.transformer(**inputs).sample, expected)
    hcms.restore(pipe.transformer)
    return found


def test_one_rank_and_a_bare_transformer_give_the_same():
    for found in on_ranks(2, one_rank_and_a_part):
        assert found == dict.fromkeys(found, True)


def traffic(place: Place) -> dict[str, Any]:
    """Collectives of one forward, by name; and what the experts share."""
    import hcms

    pipe = pipeline()
    hcms.parallelize(pipe, place.gloo, method="hcms", plan="1-2-1")
    routes = {m.processor._parallel_config.attention for e in (pipe.transformer, pipe.transformer_2)
              for m in e.modules() if hasattr(m, "processor")}  # fmt: skip
    inputs = (torch.randn(1, 16, 3, 8, 12), torch.tensor([900]), torch.randn(1, 16, 16))
    with torch.no_grad(), Collectives() as seen:
        pipe.transformer(*inputs)
    hcms.restore(pipe)
    return {"exchanges": sum(name == "alltoall_base" for name, _ in seen.calls), "attention objects": len(routes)}


def test_self_attention_alone_is_exchanged_and_experts_share_it():
    for found in on_ranks(2, traffic):
        assert found == {"exchanges": 2 * (3 + 3), "attention objects": 1}  # layers x (exchanges + returns)


def state_of(pipe: Any) -> dict[str, Any]:
    """Everything that parallelize may touch, by identity."""
    held: dict[str, Any] = {"pipe": set(pipe.__dict__)}
    for name in ("transformer", "transformer_2"):
        for at, module in getattr(pipe, name).named_modules():
            held[f"{name}.{at}"] = {k: id(v) for k, v in module.__dict__.items() if not k.startswith("_f")}
            held[f"{name}.{at} hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    return held


def there_and_back(place: Place) -> dict[str, Any]:
    import hcms
    from hcms_lab.measure.wan.build import random_pipeline

    pipe = random_pipeline(tiny(), torch.device("cpu"))
    before, keys = state_of(pipe), list(pipe.transformer.state_dict())
    same = hcms.parallelize(pipe, place.gloo, plan="even:2")
    during = state_of(pipe)
    refused = []
    for misuse in (lambda: hcms.parallelize(pipe, place.gloo), lambda: hcms.parallelize(pipe.transformer, place.gloo)):
        try:
            misuse()
        except ValueError as error:
            refused.append(str(error))
    state_dict_kept = list(pipe.transformer.state_dict()) == keys
    hcms.restore(pipe)
    after = state_of(pipe)
    try:
        hcms.restore(pipe)
    except ValueError as error:
        refused.append(str(error))
    return {
        "same object": same is pipe,
        "changed": during != before,
        "weights' names kept": state_dict_kept,
        "left over": [k for k in before if before[k] != after[k]],
        "refused": refused,
    }


def test_restore_gives_back_the_model_that_was():
    for found in on_ranks(2, there_and_back):
        refused = found.pop("refused")
        assert found == {"same object": True, "changed": True, "weights' names kept": True, "left over": []}
        assert ["already" in line for line in refused] == [True, True, False]
        assert "is not parallel" in refused[2]


def unseeded(place: Place) -> list[float]:
    import hcms

    torch.manual_seed(place.rank)
    pipe = pipeline()
    hcms.parallelize(pipe, place.gloo, plan="even:2")
    try:
        return clip(pipe, seed=None).flatten()[:50].tolist()
    finally:
        hcms.restore(pipe)


def test_without_a_seed_all_ranks_make_the_first_rank_s_clip():
    first, second = on_ranks(2, unseeded)
    assert first == second


def refusals(place: Place) -> dict[str, str]:
    import hcms

    def said(call: Any) -> str:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    pipe = pipeline()
    made: dict[str, str] = {
        "no pipeline": said(lambda: hcms.parallelize(object(), place.gloo)),
        "no plan": said(lambda: hcms.parallelize(diffusers.WanVACETransformer3DModel(**{
            **{k: v for k, v in TRANSFORMER.items() if k not in ("patch_size",)}, "vace_layers": [0]}), place.gloo)),
        "method": said(lambda: hcms.parallelize(pipe, place.gloo, method="hcsm")),
        "kernel": said(lambda: hcms.parallelize(pipe, place.gloo, kernel="flash")),
    }  # fmt: skip
    odd = diffusers.WanTransformer3DModel(**{**TRANSFORMER, "num_attention_heads": 3})
    made["heads"] = said(lambda: hcms.parallelize(odd, place.gloo))
    module = pipe.transformer.blocks[0].attn1
    module.processor, kept = object(), module.processor
    made["processor"] = said(lambda: hcms.parallelize(pipe, place.gloo))
    module.processor = kept
    return made


def test_what_does_not_fit_is_refused_by_name_with_what_is_missing():
    for found in on_ranks(2, refusals):
        assert "object cannot be made parallel: it has no transformer" in found["no pipeline"]
        assert "WanVACETransformer3DModel cannot be made parallel: it has no _cp_plan" in found["no plan"]
        assert "unknown method 'hcsm'" in found["method"]
        assert "unknown kernel 'flash'" in found["kernel"]
        assert "3 attention heads, which 2 ranks do not divide: use 1 or 3 ranks" in found["heads"]
        assert "WanTransformer3DModel cannot be made parallel: object (at blocks.0.attn1)" in found["processor"]


def odd_tokens(place: Place) -> str:
    import hcms

    pipe = pipeline()
    hcms.parallelize(pipe, place.gloo, plan="even:2")
    try:
        clip(pipe, height=48, width=80, num_frames=1, steps=1)  # 1 x 6 x 10 tokens: fine
        pipe.transformer(torch.randn(1, 16, 1, 6, 10), torch.tensor([900]), torch.randn(1, 16, 16))
    except ValueError as error:
        return str(error)
    finally:
        hcms.restore(pipe)
    return "nothing"


def test_tokens_that_ranks_do_not_divide_are_refused_with_sizes_that_would_do():
    for line in on_ranks(2, odd_tokens):
        assert line == (
            "1 frames of 40x24 are 1 x 3 x 5 = 15 tokens, which 2 ranks do not divide: frames=5, height=16 or 32, or "
            "width=32 or 48 would do, or 1, 3, 5 or 15 ranks"
        )


def other_models(place: Place) -> dict[str, Any]:
    """Flux: text and picture in one attention, split apart. ChronoEdit: another model of Wan's build."""
    import hcms

    torch.manual_seed(0)
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    edit = diffusers.ChronoEditTransformer3DModel(**{**TRANSFORMER, "text_dim": 16}).eval()
    inputs = {
        flux: {
            "hidden_states": torch.randn(2, 16, 4),
            "encoder_hidden_states": torch.randn(2, 8, 32),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.ones(2),
            "img_ids": torch.randn(16, 3),
            "txt_ids": torch.randn(8, 3),
        },
        edit: {
            "hidden_states": torch.randn(1, 16, 2, 8, 8),
            "timestep": torch.tensor([5]),
            "encoder_hidden_states": torch.randn(1, 8, 16),
        },
    }
    errors = {}
    with torch.no_grad():
        for model, given in inputs.items():
            alone = model(**given).sample
            hcms.parallelize(model, place.gloo, plan="even:2")
            errors[type(model).__name__] = (model(**given).sample - alone).abs().max().item()
    return errors


def test_other_models_that_fit_need_nothing_of_their_own():
    for errors in on_ranks(2, other_models):
        assert errors["ChronoEditTransformer3DModel"] == 0
        assert errors["FluxTransformer2DModel"] < 1e-5  # its tokens stand in another order, so sums round differently


def sharded(place: Place) -> dict[str, Any]:
    """FSDP2: weights gathered block by block over the same ranks; the same bits come out."""
    import hcms
    from hcms_lab.measure.wan.build import random_pipeline

    whole = clip(pipeline())
    pipe = random_pipeline(tiny(), torch.device("cpu"), sharding="fsdp2")
    pipe.set_progress_bar_config(disable=True)
    local = sum(p.to_local().numel() for p in pipe.transformer.parameters())
    hcms.parallelize(pipe, place.gloo, plan="even:2")
    ours = clip(pipe)
    return {"share": local / sum(p.numel() for p in pipe.transformer.parameters()), "equal": torch.equal(ours, whole)}


def test_sharded_weights_give_the_same_frames():
    for found in on_ranks(2, sharded):
        assert found["equal"]
        assert found["share"] == pytest.approx(0.5, abs=0.05)


def test_rows_of_a_linear_layer_do_not_depend_on_their_neighbours():
    """What bitwise equality with one process stands on. Where a BLAS breaks it, the tests above must give a bound."""
    torch.manual_seed(0)
    for width, out in ((96, 96), (96, 64), (64, 96)):
        layer, x = torch.nn.Linear(width, out), torch.randn(1, 72, width)
        assert torch.equal(torch.cat([layer(part) for part in x.chunk(4, dim=1)], dim=1), layer(x))
