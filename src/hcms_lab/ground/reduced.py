"""Whether a run is whole: how it falls short of what its experiment's own file in `conf/exp/` asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from hcms_lab.ground.config import BaseConfig

SIZES = tuple(f"workload.{name}" for name in ("tokens_per_frame", "heads", "head_dim", "batch"))
EVERY = ("each", "all")  # settings that stand for what a machine has: anything else is less
NOT_POINTS = ("name", "kind", "about", "on_gpus", "on_link", "on_shared", "output", "resume", "wandb", "model")


def reductions(cfg: BaseConfig, own: BaseConfig) -> list[str]:
    """What a run has less of than its experiment's own settings, such as ["3 of 10 rounds", "1 of 4 latent_frames"]."""
    taken, wanted = (dict(_values(OmegaConf.to_container(OmegaConf.structured(c), resolve=True))) for c in (cfg, own))
    less = []
    for name, values in wanted.items():
        there, short = taken.get(name, values), name.split(".")[-1]
        if name == "bench.iterations" and there[0] < values[0]:
            less.append(f"{there[0]} of {values[0]} rounds")
        elif name in SIZES and there[0] < values[0]:
            less.append(f"{there[0]} of {values[0]} {short}")
        elif values[0] in EVERY and there != values:
            less.append(f"{short} {', '.join(map(str, there))} of {values[0]}")
        elif len(there) < len(values):
            less.append(f"{len(there)} of {len(values)} {short}")
        elif name == "latent_frames" and max(there) < max(values):
            less.append(f"{short} up to {max(there)} of {max(values)}")
        elif name == "methods" and (absent := [m for m in _names(values) if m not in _names(there)]):
            less.append(f"no {', '.join(absent)}")
    return less


def _names(methods: list[Any]) -> list[str]:
    """Each method once, without its cuts."""
    return list(dict.fromkeys(str(entry).partition("@")[0] for entry in methods))


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every setting as the list that it is or stands for, by its dotted name."""
    for name, value in config.items():
        if not prefix and name in NOT_POINTS:
            continue
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value:
            yield f"{prefix}{name}", value
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", [value]
