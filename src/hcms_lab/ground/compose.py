"""Hydra's composition, with one line for whatever it refuses. A kind of experiment says which settings there are."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hcms_lab.ground.checks import one_of
from hcms_lab.ground.config import BaseConfig
from hcms_lab.ground.errors import UsageError

COMPOSING = (HydraException, OmegaConfBaseException)
# Where a kind has the new name and not the old one.
RENAMED = {"frames": ("latent_frames", "frames counts video frames, which only experiments of whole clips have")}


_KINDS: dict[str, type[BaseConfig]] = {}  # those that Hydra knows


def add_kind(kind: str, settings: type[BaseConfig]) -> None:
    """Let `- /kind: <kind>` in an experiment's defaults stand for these settings."""
    if _KINDS.get(kind) is not settings:
        ConfigStore.instance().store(kind, settings, group="kind", package="_global_")
        _KINDS[kind] = settings


def composed(conf: Path, overrides: list[str], schema: type[BaseConfig]) -> BaseConfig:
    """The typed configuration that `conf/config.yaml` and these overrides come to; `schema` is that of their kind.

    Raises:
        UsageError: a key, group or value that does not exist or does not fit.
    """
    GlobalHydra.instance().clear()
    _check_choices(conf, overrides)
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            found = compose("config", overrides)
            # A `+` in front goes past the schema, and `~kind` leaves none.
            if unknown := set(_names(found, _typed(schema))) - set(settings(schema)):
                raise UsageError(no_such_setting(min(unknown), schema))
            cfg = OmegaConf.to_object(found)
    except COMPOSING as error:
        raise UsageError(one_line(error, schema)) from None
    except RecursionError:
        raise UsageError("an override cannot be read: it goes too deep") from None
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"an override cannot be read: {str(error).splitlines()[0]:.200}") from None
    if not isinstance(cfg, schema):
        raise UsageError("kind: an experiment cannot do without; leave it as the experiment has it")
    return cfg


def _check_choices(conf: Path, overrides: list[str]) -> None:
    """Refuse a group's choice that is no file of the group's own folder: Hydra would follow it to any other."""
    for override in overrides:
        key, _, choice = override.partition("=")
        group = key.lstrip("+~").partition("@")[0]
        if not key.startswith("~") and group.isidentifier() and (conf / group).is_dir():
            one_of(group, choice, sorted(path.stem for path in (conf / group).glob("*.yaml")))


def one_line(error: Exception, schema: type[BaseConfig]) -> str:
    """What Hydra or OmegaConf says in several lines, as one that names the option, its value and what would do."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: choose one of {', '.join(error.options)}"
    text = f"{error}\n{error.__cause__ or ''}"
    named = re.findall(r"^Could not override '(.+?)'", text)
    if re.search(r"Key '.*' (?:is )?not in ", text):
        named += re.findall(r"full_key: (\S+)", text)
    if named:
        return no_such_setting(max(named, key=len), schema)  # bench={a: 3} is about bench.a, gone.x=3 about gone.x
    first, *_ = str(error).splitlines() or [type(error).__name__]
    if first.startswith("Error merging override") and str(error.__cause__):
        return f"{first.removeprefix('Error merging override ')}: {str(error.__cause__).splitlines()[0]}"
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())


def no_such_setting(name: str, schema: type[BaseConfig]) -> str:
    """That a name is none of the settings, with the one that may be meant."""
    known = settings(schema)
    if name in RENAMED and RENAMED[name][0] in known:
        new, why = RENAMED[name]
        return f"{name}: it is called {new} here; {why}"
    near = get_close_matches(name, known, n=1)
    return f"{name}: no such setting; " + (
        f"{near[0]} is the nearest" if near else "--cfg job shows those that there are"
    )


@cache
def settings(schema: type[BaseConfig]) -> tuple[str, ...]:
    """The dotted names of all settings of a kind."""
    return tuple(_names(_typed(schema), _typed(schema)))


@cache
def _typed(schema: type[BaseConfig]) -> DictConfig:
    """All settings of a kind at their defaults, to be read only."""
    return OmegaConf.structured(schema)


def _names(node: Any, typed: Any, prefix: str = "") -> list[str]:
    """The dotted names of what a node holds, as deep as the schema (`typed`) says what there is."""
    names = []
    for key in node:
        names.append(f"{prefix}{key}")
        inner = None if key not in typed or OmegaConf.is_missing(typed, key) else typed[key]
        if OmegaConf.is_dict(inner) and OmegaConf.is_dict(node[key]) and is_dataclass(OmegaConf.get_type(inner)):
            names += _names(node[key], inner, f"{prefix}{key}.")
    return names
