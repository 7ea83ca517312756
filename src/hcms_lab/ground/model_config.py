"""The configuration of a whole pipeline: which model, which clips, and what of them is refused. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hcms.clip import ClipShape, Strides
from hcms.schedule.cost import ITEMSIZE
from hcms_lab.ground.checks import as_list, distinct, number, one_of, whole
from hcms_lab.ground.errors import UsageError

DTYPES = tuple(ITEMSIZE)


@dataclass
class ModelConfig:
    """A video pipeline as diffusers and transformers build it; `conf/model/*.yaml` holds one a file.

    `transformer`, `vae`, `text_encoder` and `scheduler` are the arguments of WanTransformer3DModel, AutoencoderKLWan,
    UMT5Config and UniPCMultistepScheduler, so that random weights need no network.
    """

    name: str = ""
    task: str = "t2v"  # t2v | i2v
    hub: str | None = None  # where weights=pretrained finds it when no weights_path is given
    experts: int = 1  # denoising transformers of this one architecture
    boundary_ratio: float | None = None  # share of the training steps at which the second expert takes over
    expand_timesteps: bool = False  # a timestep a token (TI2V-5B)
    transformer: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"  # of transformers and text encoder; the VAE runs in float32, as diffusers advises for Wan
    width: int = 1280
    height: int = 720
    frames: int = 81  # video frames, 4n + 1
    fps: int = 16
    steps: int = 40
    flow_shift: float = 5.0
    guidance: float = 1.0  # of the first (high-noise) expert; 1 is none
    guidance_2: float | None = None  # of the second (low-noise) expert
    text_tokens: int = 512
    decode_mflop_a_pixel: float | None = None  # of the VAE's decoder, for predictions


@dataclass
class ClipConfig:
    """Which clips of which model a run is about. Null is the model's own value."""

    model: ModelConfig = field(default_factory=ModelConfig)
    frames: Any = None  # video frames, 4n + 1: an int or a list
    width: int | None = None
    height: int | None = None
    steps: int | None = None  # denoising steps a clip
    flow_shift: float | None = None
    guidance: float | None = None
    guidance_2: float | None = None


# Arguments without which no size of a model is known.
NEEDED = {
    "transformer": (
        *("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "in_channels", "out_channels"),
        *("text_dim", "freq_dim", "patch_size"),
    ),
    "text_encoder": ("vocab_size", "d_model", "d_ff", "num_heads", "d_kv", "num_layers"),
}
# The least and the most of an argument; of any other whole number 1 and 2^20. A slip must not build for hours.
BOUNDS = {
    "num_layers": (1, 1000),
    "num_attention_heads": (1, 4096),
    "num_heads": (1, 4096),
    "num_res_blocks": (0, 64),
    "vocab_size": (1, 10_000_000),
}


def chosen_model(cfg: ClipConfig) -> ModelConfig:
    """The model with the run's own settings in it, checked.

    Raises:
        UsageError: no model, an unknown choice, an argument that is missing, or a number out of range.
    """
    model = cfg.model
    if not model.name:
        raise UsageError("model: none chosen; give model=wan-tiny or another file of conf/model/")
    own = {k: getattr(cfg, k) for k in ("width", "height", "steps", "flow_shift", "guidance", "guidance_2")}
    model = replace(model, **{k: v for k, v in own.items() if v is not None})
    check_model(model)
    return model


def check_model(model: ModelConfig) -> None:
    """Refuse a model that nothing could be built of."""
    one_of("model.task", model.task, ("t2v", "i2v"))
    one_of("model.dtype", model.dtype, DTYPES)
    for name, high in (("width", 2**16), ("height", 2**16), ("steps", 10_000)):
        whole(name, getattr(model, name), high=high)
    for name, high in (("text_tokens", 2**16), ("experts", 2), ("fps", 1000)):
        whole(f"model.{name}", getattr(model, name), high=high)
    number("flow_shift", model.flow_shift, 0, 1000, above=True)
    number("guidance", model.guidance, 0, 1000)
    if model.guidance_2 is not None:
        number("guidance_2", model.guidance_2, 0, 1000)
    if model.boundary_ratio is not None:
        number("model.boundary_ratio", model.boundary_ratio, 0, 1)
    if model.decode_mflop_a_pixel is not None:
        number("model.decode_mflop_a_pixel", model.decode_mflop_a_pixel, 0, 1e6)
    for part in ("transformer", "vae", "text_encoder", "scheduler"):
        arguments = getattr(model, part)
        for name in NEEDED.get(part, ()):
            if arguments.get(name) is None:
                raise UsageError(f"model.{part}.{name}: missing; conf/model/wan-tiny.yaml shows what a model needs")
        for name, value in arguments.items():
            _check_argument(f"model.{part}.{name}", name, value, needed=name in NEEDED.get(part, ()))
    patch = model.transformer["patch_size"]
    if len(as_list(patch)) != 3:
        raise UsageError(f"model.transformer.patch_size={patch}: give three: latent frames, rows, columns")


def _check_argument(shown: str, name: str, value: Any, *, needed: bool) -> None:
    """Numbers in bounds; what is needed is a number. Words and truth values are for diffusers to judge."""
    for part in as_list(value):
        if needed or (isinstance(part, int) and not isinstance(part, bool)):
            whole(shown, part, *BOUNDS.get(name, (1, 2**20)))
        elif isinstance(part, float):
            number(shown, part, -1e6, 1e6)


def clips_of(cfg: ClipConfig, model: ModelConfig) -> list[ClipShape]:
    """The clips' shapes; `frames` counts video frames here.

    Raises:
        UsageError: frames that are not 4n + 1, or a size that is not whole in patches.
    """
    frames = [model.frames] if cfg.frames is None else as_list(cfg.frames)
    distinct("frames", frames, "give at least one number of video frames, or null for the model's own")
    try:
        strides = Strides.of(model.transformer, model.vae)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"model={model.name}: its patches or strides are no numbers ({error})") from None
    clips = []
    for n in frames:
        whole("frames", n, high=100_000)
        try:
            clips.append(ClipShape(n, model.height, model.width, strides))
        except ValueError as error:
            raise UsageError(str(error)) from None
    return clips
