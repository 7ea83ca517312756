"""The settings of a run as others may see them."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from omegaconf import OmegaConf

from hcms_lab.ground.private import scrubbed

_LEFT_OUT = ("output", "resume", "wandb")  # where and as whom
_PATHS = ("profile", "weights_path", "image")


def published(cfg: Any) -> dict[str, Any]:
    """What the settings say of a measurement, without the paths, accounts and secrets that say who made it.

    `config.resolved.yaml` itself never leaves the machine: it holds every setting as it was given.
    """
    settings = OmegaConf.structured(cfg) if is_dataclass(cfg) else cfg
    found = OmegaConf.to_container(settings, resolve=True, throw_on_missing=False)
    assert isinstance(found, dict)
    kept = {str(key): value for key, value in found.items() if key not in _LEFT_OUT}
    return scrubbed(kept | {name: "<path>" for name in _PATHS if kept.get(name) is not None})
