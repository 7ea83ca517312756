"""Whether a clip fits: token counts, heads, traffic and memory a rank for each rank count, before anything is loaded.

Weights are counted on the meta device. Activations are measured there too: one transformer block and the VAE's decoder
run without memory, and every tensor that is alive is added up. What the allocator loses to fragmentation is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hcms.clip import ClipShape, divisors
from hcms.schedule.cost import Workload
from hcms_lab.ground.model_config import ModelConfig
from hcms_lab.measure.wan.build import text_encoder_on_meta, transformer_on_meta, vae_on_meta

GIB = 2**30
RESERVE = 1.0 * GIB  # CUDA's context, communicators, cuBLAS workspaces
MAX_RANKS = 16
DECODED_FRAMES = 31  # latent frames that are decoded on the meta device, 121 video frames; more would take long
_DECODE_BYTES: dict[tuple[str, ClipShape, bool], float] = {}  # of a VAE's arguments, a clip, and whether in tiles


@dataclass(frozen=True, slots=True)
class RankCount:
    """What a rank has to do and hold when so many share a clip. Bytes; an exchange's are those that leave the rank."""

    ranks: int
    tokens_a_rank: int
    heads_a_rank: int
    exchange_bytes_a_layer: int
    exchange_bytes_a_step: int
    weight_bytes: float
    step_bytes: float
    decode_bytes: float
    buffer_bytes: int  # of one attention object; part of a step's
    expert_bytes: float  # a layer's `layer_bytes` of it times layers
    layer_bytes: float
    text_encoder_bytes: float
    vae_bytes: float

    @property
    def need_bytes(self) -> float:
        """All weights at once, and the larger of a denoising step and the decoding."""
        return self.weight_bytes + max(self.step_bytes, self.decode_bytes) + RESERVE

    def steps_need_bytes(self, layers_left_out: int) -> float:
        """Where steps of one expert are timed: its weights and a step, or either end's, which are gone by then."""
        expert = self.expert_bytes - layers_left_out * self.layer_bytes
        return max(expert + self.step_bytes, self.vae_bytes + self.decode_bytes, self.text_encoder_bytes) + RESERVE


def rank_counts(
    model: ModelConfig, clip: ClipShape, *, sharding: str = "none", guidance: bool = True, vae_tiling: bool = False
) -> list[RankCount]:
    """What each possible number of ranks up to 16 needs. Builds the model on meta: allocates nothing, reads nothing.

    Raises:
        TypeError, ValueError: arguments that diffusers or transformers do not take.
    """
    heads, head_dim, layers = (
        int(model.transformer[k]) for k in ("num_attention_heads", "attention_head_dim", "num_layers")
    )
    element = torch.empty(0, dtype=getattr(torch, model.dtype)).element_size()
    expert = transformer_on_meta(model)
    vae = vae_on_meta(model)
    expert_bytes, block_bytes = _bytes(expert), _bytes(expert.get_submodule("blocks.0"))
    text_bytes, vae_bytes = _bytes(text_encoder_on_meta(model)), _bytes(vae)
    decoding = (repr(model.vae), clip, vae_tiling)
    if decoding not in _DECODE_BYTES:  # a command asks twice, and decoding on meta takes seconds
        _DECODE_BYTES[decoding] = _decode_bytes(vae, clip, vae_tiling)
    decode_bytes = _DECODE_BYTES[decoding]
    found = []
    for ranks in divisors(heads):
        if ranks > MAX_RANKS or clip.tokens % ranks:
            continue
        sharded = sharding == "fsdp2" and ranks > 1
        # A sharded expert also holds the block at work and the next one, gathered.
        expert_here = expert_bytes / ranks + 2 * block_bytes if sharded else expert_bytes
        attention = Workload(clip.tokens, heads, ranks, head_dim, dtype=model.dtype)
        layer = int(attention.off_rank(4 * attention.tensor_bytes(attention.heads_a_rank)))
        found.append(
            RankCount(
                ranks,
                clip.tokens // ranks,
                heads // ranks,
                layer,
                layer * layers * (2 if guidance else 1),
                model.experts * expert_here + text_bytes + vae_bytes,
                _step_bytes(expert, model, clip, ranks, element),
                decode_bytes,
                _buffer_bytes(clip.tokens // ranks, heads * head_dim, element),
                expert_here,
                block_bytes / ranks if sharded else block_bytes,
                text_bytes,
                vae_bytes,
            )
        )
    return found


def _bytes(module: nn.Module) -> float:
    return float(sum(p.numel() * p.element_size() for p in module.parameters()))


def _step_bytes(expert: Any, model: ModelConfig, clip: ClipShape, ranks: int, element: int) -> float:
    """The most that a denoising step holds on a rank, beside the weights."""
    from hcms.diffusers import attach, restore

    dtype = getattr(torch, model.dtype)
    S, L = clip.tokens, clip.tokens // ranks
    N, H = int(model.transformer["num_attention_heads"]), int(model.transformer["attention_head_dim"])
    d = N * H
    on_meta = {"device": "meta", "dtype": dtype}
    modulation = (1, L, 6, d) if model.expand_timesteps else (1, 6, d)
    rotary = tuple(torch.empty(1, L, 1, H, device="meta") for _ in range(2))
    inputs = (
        torch.empty(1, L, d, **on_meta),
        torch.empty(1, model.text_tokens, d, **on_meta),
        torch.empty(modulation, **on_meta),
        rotary,
    )
    attach(expert, lambda q, k, v: torch.empty_like(q), None)
    try:
        peak = Peak()
        route = expert.blocks[0].attn1.processor._parallel_config
        with torch.no_grad(), route.active(), peak:
            expert.blocks[0](*inputs)
    finally:
        restore(expert)
    block = peak.bytes + sum(t.numel() * t.element_size() for t in (*inputs[:3], *rotary))
    whole = 2 * S * d * element + 4 * S * H * 4  # embedded tokens and their copy, rotary tables: whole on every rank
    return whole + block + _buffer_bytes(L, d, element)


def _buffer_bytes(local_tokens: int, width: int, element: int) -> int:
    """Sent and received Q, K and V, and the kernel's result."""
    return 7 * local_tokens * width * element


def _decode_bytes(vae: Any, clip: ClipShape, tiling: bool) -> float:
    """The most that decoding holds. In tiles: one tile's, and all decoded tiles beside the frames they become."""
    s = clip.strides
    height, width, decoded = clip.height, clip.width, 0
    if tiling and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width):
        decoded = 2 * 3 * clip.frames * height * width * 4
        height, width = min(height, vae.tile_sample_min_height), min(width, vae.tile_sample_min_width)
    # Latent frames are decoded one by one: each adds itself and its pixels, twice while joined to those before.
    counted = min(clip.latent_frames, DECODED_FRAMES)
    values_a_pixel = 3 * s.temporal + int(vae.config.z_dim) / s.spatial**2
    a_frame = 2 * 4 * clip.height * clip.width * values_a_pixel
    latents = torch.empty(1, int(vae.config.z_dim), counted, height // s.spatial, width // s.spatial, device="meta")
    peak = Peak()
    with torch.no_grad(), peak:
        vae.decode(latents)
    return peak.bytes + latents.nbytes + decoded + (clip.latent_frames - counted) * a_frame


class Peak(TorchDispatchMode):
    """Adds up the tensors that operations make and that are still alive; `bytes` is the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result
