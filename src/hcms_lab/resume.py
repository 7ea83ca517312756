"""Going on with a run that was cut off: only with the same settings, code and machine, and said so in its records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from hcms.hardware import hardware
from hcms_lab.ground.checks import as_list, is_folder
from hcms_lab.ground.config import BaseConfig, Config, LayerConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.paths import ROOT
from hcms_lab.ground.records import SCHEMA, read_rows, repeated
from hcms_lab.measure.cases import device_of, link_of
from hcms_lab.measure.environment import environment

_ANY = ("output", "resume", "wandb")  # settings that say nothing about a measurement
_SAME = ("commit", "code", "hardware", "link", "python", "versions", "variables", "cuda", "driver", "nccl")


def folder_of(cfg: BaseConfig) -> Path:
    """The folder that `resume` names: the run's own, where a link such as `latest` was given."""
    return Path(str(cfg.resume)).resolve()


def check_resume(cfg: BaseConfig) -> None:
    """Refuse to go on where the records would then not be of one run.

    Raises:
        UsageError: no run there, committed records, or the first difference in experiment, machine, settings or code.
    """
    from hcms_lab.ground import load

    given = f"resume={cfg.resume}"
    folder = folder_of(cfg) if is_folder(str(cfg.resume)) else Path()
    if folder == Path() or not any((folder / name).is_file() for name in ("records.jsonl", "env.json")):
        raise UsageError(f"{given}: no records.jsonl there; give the folder of an earlier run")
    if (ROOT / "paper_tables").resolve() in folder.parents:
        raise UsageError(f"{given}: committed records stay as they are; give a run's folder under outputs/")
    theirs, their_env = load.config(folder), load.environment(folder)
    if theirs.get("name", cfg.name) != cfg.name:
        raise UsageError(f"{given}: that is a run of {theirs['name']}, not of {cfg.name}; give +exp={theirs['name']}")
    here = hardware(device_of(cfg))
    slug = (their_env.get("hardware") or {}).get("slug")
    if slug not in (None, here.slug):
        raise UsageError(f"{given}: that run was made on {slug}, and this is {here.slug}; start a new one")
    if not theirs or not their_env:
        raise UsageError(f"{given}: no config.resolved.yaml and env.json there say how it was made; start a new run")
    for name, their, mine in _differences(theirs, yaml.safe_load(settings_text(cfg)), leave_out=_ANY):
        raise UsageError(
            f"{given}: {name} was {their} there and is {mine} here; give {name}={their}, or start a new run"
        )
    rows = read_rows(folder / "records.jsonl")
    if count := repeated(rows):
        raise UsageError(f"{given}: {count} of its records are of a case that has one already; start a new run")
    for name, told in _told(cfg, here.slug).items() if isinstance(cfg, Config) else ():
        if others := {row.get(name) for row in rows if row.get("source") == "measured"} - set(told):
            own = " or ".join(map(str, told))
            raise UsageError(f"{given}: a record there has {name} {others.pop()}, not {own}; start a new run")
    my_env = facts_of(cfg)
    kept = {key: their_env.get(key) for key in _SAME}
    for name, their, mine in _differences(kept, {key: my_env.get(key) for key in _SAME}):
        raise UsageError(f"{given}: {name} was {their} there and is {mine} here; start a new run")


def _told(cfg: Config, slug: str) -> dict[str, Sequence[Any]]:
    """What a record of this configuration may say. Kinds that are no `Config` gather what was measured elsewhere."""
    told: dict[str, Sequence[Any]] = {"schema": [SCHEMA], "exp": [cfg.name], "hardware": [slug], "link": [link_of(cfg)]}
    if isinstance(cfg, LayerConfig):
        w = cfg.workload
        told |= {"workload": [w.name], "heads": [w.heads], "head_dim": [w.head_dim], "batch": [w.batch]}
        told |= {"dtype": as_list(w.dtype), "seed": [cfg.bench.seed]}
    return told


def facts_of(cfg: BaseConfig) -> dict[str, Any]:
    """What `env.json` says of a run that begins here and now."""
    device = device_of(cfg)
    link = link_of(cfg) if isinstance(cfg, Config) else "none"  # a prediction, say, exchanges nothing
    return environment(hardware(device), link, device)


def settings_text(cfg: BaseConfig) -> str:
    """What `config.resolved.yaml` holds."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def with_segment(earlier: Mapping[str, Any], now: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The environment of a run that goes on: the first segment's facts, and those of every segment under `segments`.

    A segment that was killed could not say how long it ran: until its last record, then.
    """
    first = {key: value for key, value in earlier.items() if key != "segments"}
    segments = [dict(segment) for segment in earlier.get("segments") or [first]]
    records = folder / "records.jsonl"
    if segments[-1].get("wall_s") is None and segments[-1].get("started") and records.is_file():
        began_s = datetime.fromisoformat(segments[-1]["started"]).timestamp()
        segments[-1]["wall_s"] = round(max(0.0, records.stat().st_mtime - began_s), 1)
    return {**first, "segments": [*segments, now]}


def add_wall(env: dict[str, Any], wall_s: float) -> None:
    """Note how long the newest segment took, and all of them together."""
    segments = env.get("segments") or [env]
    segments[-1]["wall_s"] = round(wall_s, 1)
    env["wall_s"] = round(sum(segment.get("wall_s") or 0.0 for segment in segments), 1)


def _differences(
    theirs: Any, mine: Any, name: str = "", *, leave_out: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted names under which two settings differ, with both values."""
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        for key in dict.fromkeys([*theirs, *mine]):
            if key not in leave_out:
                yield from _differences(theirs.get(key), mine.get(key), f"{name}.{key}".lstrip("."))
    elif theirs != mine:
        yield name, "none" if theirs is None else theirs, "none" if mine is None else mine
