"""A model with adapters, offload, checkpointing, fused or compiled layers gives the same on ranks, before or after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hcms
from ranks import Place, on_ranks
from tiny_wan import INPUTS, expert, parallel, run, said

pytestmark = pytest.mark.t1


class LowRank(nn.Module):
    """A linear layer with an adapter beside it, as LoRA puts one in its place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.layer = layer
        self.down = nn.Parameter(torch.randn(4, layer.in_features, generator=generator) * 0.1)
        self.up = nn.Parameter(torch.randn(layer.out_features, 4, generator=generator) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def adapt(model: Any) -> None:
    for block in model.blocks:
        for name in ("to_q", "to_v"):
            setattr(block.attn1, name, LowRank(getattr(block.attn1, name)))
    model.requires_grad_(False)


def offload(model: Any) -> None:
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "block_level", num_blocks_per_group=1)


def offload_leaves(model: Any) -> None:
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")


def checkpointed(model: Any) -> None:
    model.enable_gradient_checkpointing()


def compiled_blocks(model: Any) -> None:
    model.compile_repeated_blocks(backend="eager")


def compiled(model: Any) -> None:
    model.compile(backend="eager")


def fused(model: Any) -> None:
    model.fuse_qkv_projections()


COMPILING = [compiled_blocks, compiled]
CHANGES = [adapt, offload, offload_leaves, checkpointed, *COMPILING, fused]


def changed(place: Place, change: Callable[[Any], None], when: str) -> dict[str, Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, model = expert(), expert()
    found: dict[str, Any] = {"before the change": run(plain)}
    if change not in COMPILING:
        change(plain)
    alone = run(plain)
    found["changes"] = not torch.equal(alone, found.pop("before the change"))
    if when == "before":
        change(model)
    hcms.parallelize(model, place.gloo, plan="even:2")
    if when == "after":
        change(model)
    found["off"] = [(run(model) - alone).abs().max().item()]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found["off"].append((run(model) - alone).abs().max().item())
    found["graphs"] = (graphs, torch._dynamo.utils.counters["stats"]["unique_graphs"])
    hcms.restore(model)
    found["off"].append((run(model) - alone).abs().max().item())
    return found


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_gives_the_same_on_ranks(change, when):
    for found in on_ranks(2, changed, change, when):
        assert found["changes"] is (change is adapt)
        # Compiled code may sum in an order of its own.
        assert max(found["off"]) <= (1e-5 if change in COMPILING else 0)
        first, second = found["graphs"]
        assert first == second  # a second run compiles nothing again
        assert (first > 0) is (change in COMPILING)


def wrapped(place: Place) -> dict[str, Any]:
    """`torch.compile(model)`, which is another module around it."""
    torch._dynamo.reset()
    model = expert()
    alone = run(model)
    pipe = torch.compile(model, backend="eager")
    hcms.parallelize(pipe, place.gloo, plan="even:2")
    off = (run(pipe) - alone).abs().max().item()
    hcms.restore(pipe)
    return {"off": off, "left over": hasattr(model, "_hcms")}


def test_a_compiled_wrapper_is_looked_through():
    for found in on_ranks(2, wrapped):
        assert found["off"] < 1e-5
        assert not found["left over"]


def gradients(place: Place) -> dict[str, Any]:
    model = expert()
    alone = run(model)
    model.enable_gradient_checkpointing()
    with parallel(model, place):
        frozen = model(**INPUTS).sample  # gradients are on, but nothing needs any
        model.requires_grad_(True)
        return {"frozen": torch.equal(frozen, alone), "needed": said(lambda: model(**INPUTS))}


def test_gradients_are_refused_where_they_are_needed():
    for found in on_ranks(2, gradients):
        assert found["frozen"]
        assert "this attention is forward only" in found["needed"]


def lora(model: Any) -> None:
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_by_peft_gives_the_same_on_ranks(when):
    for found in on_ranks(2, changed, lora, when):
        assert found["changes"]
        assert max(found["off"]) == 0
