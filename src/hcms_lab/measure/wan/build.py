"""Build a whole pipeline: from published arguments with random weights, or from weights on disk or the hub.

Random weights measure time and memory: the architecture is diffusers' and transformers' own, the frames are noise.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hcms_lab.ground.model_config import ModelConfig

Pipeline = Any  # diffusers.WanPipeline or WanImageToVideoPipeline


def transformer_on_meta(model: ModelConfig) -> nn.Module:
    """One expert without memory for its weights, in the dtypes that loading it would give."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        made = WanTransformer3DModel(**_arguments(model.transformer))
    return _cast(made, getattr(torch, model.dtype), tuple(made._keep_in_fp32_modules or ()))


def vae_on_meta(model: ModelConfig) -> nn.Module:
    """The VAE, in float32, without memory for its weights."""
    from diffusers import AutoencoderKLWan

    arguments = _arguments(model.vae)
    if arguments.get("z_dim", 16) != 16:
        # diffusers' defaults for the latents' mean and deviation are those of 16 channels; random weights need neither.
        arguments.setdefault("latents_mean", [0.0] * arguments["z_dim"])
        arguments.setdefault("latents_std", [1.0] * arguments["z_dim"])
    with torch.device("meta"):
        return AutoencoderKLWan(**arguments)


def text_encoder_on_meta(model: ModelConfig) -> nn.Module:
    """The text encoder without memory for its weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(**_arguments(model.text_encoder), use_cache=False)
    with torch.device("meta"):
        made = UMT5EncoderModel(config)
    return _cast(made, getattr(torch, model.dtype), ("wo",))  # as transformers keeps T5's feed-forward output


def materialize(module: nn.Module, device: torch.device, seed: int) -> nn.Module:
    """Give a module on meta memory on `device` and random weights: the same on every rank, sharded or not.

    Matrices and kernels get variance 1 / fan-in, so that activations neither vanish nor overflow; norms start at one.
    Non-persistent buffers are computed as their module would have.
    """
    rotary = {name: _rotary(m, device) for name, m in module.named_modules() if type(m).__name__ == "WanRotaryPosEmbed"}
    module.to_empty(device=device)
    for name, made in rotary.items():
        for key, value in made.items():
            module.get_submodule(name)._buffers[key] = value
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # One generator a parameter, seeded by its name: neither order nor sharding changes what it draws.
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) ^ seed)
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            _draw(name, full, generator)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(whole.to_local())
            else:
                parameter.copy_(full)
    return module.requires_grad_(False).eval()


def random_expert(model: ModelConfig, device: torch.device, seed: int = 0, *, sharding: str = "none") -> nn.Module:
    """One denoising transformer with random weights; see `random_pipeline`."""
    expert = transformer_on_meta(model)
    if sharding == "fsdp2":
        shard(expert, device)
    return materialize(expert, device, seed)


def random_text_encoder(model: ModelConfig, device: torch.device, seed: int = 0) -> nn.Module:
    return materialize(text_encoder_on_meta(model), device, seed + 10)


def random_vae(model: ModelConfig, device: torch.device, seed: int = 0) -> nn.Module:
    return materialize(vae_on_meta(model), device, seed + 20)


def scheduler(model: ModelConfig) -> Any:
    """The pipeline's scheduler, its timesteps still to be set."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(**_arguments(model.scheduler), flow_shift=model.flow_shift)


def random_pipeline(model: ModelConfig, device: torch.device, seed: int = 0, *, sharding: str = "none") -> Pipeline:
    """The whole pipeline with random weights; the tokenizer is ByT5's, whose tokens are bytes and need no file.

    `sharding="fsdp2"` shards the transformers over the default process group, block by block (torch's `fully_shard`).
    """
    from diffusers import WanImageToVideoPipeline, WanPipeline
    from transformers import ByT5Tokenizer

    experts = [random_expert(model, device, seed + index, sharding=sharding) for index in range(model.experts)]
    parts: dict[str, Any] = {
        "tokenizer": ByT5Tokenizer(),
        "text_encoder": random_text_encoder(model, device, seed),
        "vae": random_vae(model, device, seed),
        "scheduler": scheduler(model),
        "transformer": experts[0],
        "transformer_2": experts[1] if model.experts > 1 else None,
        "boundary_ratio": model.boundary_ratio,
        "expand_timesteps": model.expand_timesteps,
    }
    if model.task == "i2v":
        return WanImageToVideoPipeline(**parts)
    return WanPipeline(**parts)


def pretrained_pipeline(model: ModelConfig, source: str, device: torch.device, *, sharding: str = "none") -> Pipeline:
    """The pipeline from a folder that `save_pretrained` wrote, or from the hub, with `flow_shift` set as given.

    Raises:
        OSError: neither such a folder nor such a hub name; ValueError: it is another pipeline.
    """
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline

    vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32)
    kind = WanImageToVideoPipeline if model.task == "i2v" else WanPipeline
    pipe = kind.from_pretrained(source, vae=vae, torch_dtype=getattr(torch, model.dtype))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=model.flow_shift)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
            if sharding == "fsdp2" and name.startswith("transformer"):
                shard(part, device)
            part.to(device)
    return pipe


def shard(transformer: nn.Module, device: torch.device) -> nn.Module:
    """Shard a transformer's weights over the default process group with FSDP2, one unit a block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    transformer.requires_grad_(False)  # inference; and a unit of mixed dtypes is only taken without gradients
    for block in transformer.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)
    return transformer


def _arguments(given: Any) -> dict[str, Any]:
    """Plain containers: configurations bring their own list types, which models keep and cannot save."""
    return {k: list(v) if hasattr(v, "__iter__") and not isinstance(v, str) else v for k, v in dict(given).items()}


def _cast(module: nn.Module, dtype: torch.dtype, keep_float32: tuple[str, ...]) -> Any:
    for name, parameter in module.named_parameters():
        kept = any(part in keep_float32 for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    return module


def _rotary(module: Any, device: torch.device) -> dict[str, torch.Tensor]:
    made = type(module)(module.attention_head_dim, module.patch_size, module.max_seq_len)
    return {name: buffer.to(device) for name, buffer in made.named_buffers()}


def _draw(name: str, full: torch.Tensor, generator: torch.Generator) -> None:
    last = name.rsplit(".", 1)[-1]
    if full.ndim < 2 or last == "gamma":
        if last == "bias":
            full.normal_(0.0, 0.02, generator=generator)
        else:
            full.fill_(1.0)
    elif "embed_tokens" in name or name == "shared.weight":
        full.normal_(0.0, 1.0, generator=generator)
    elif last == "scale_shift_table":
        full.normal_(0.0, full.shape[-1] ** -0.5, generator=generator)
    else:
        full.normal_(0.0, full[0].numel() ** -0.5, generator=generator)
