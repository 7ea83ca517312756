"""What a run that was cut off has of whole points, as a run of its own: fewer than was asked for, and says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hcms_lab.ground.checks import as_list
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import config, environment, records
from hcms_lab.ground.reduced import EVERY


def unanswered(table: pd.DataFrame, cfg: Mapping[str, Any]) -> dict[str, list[Any]]:
    """By option, the values that a configuration asked for and no record answers: `{"latent_frames": [9]}`."""
    # A clip's configuration counts video frames, its records latent ones as well.
    frames = ("frames", "num_frames") if "num_frames" in table else ("latent_frames", "frames")
    found: dict[str, list[Any]] = {}
    for option, column in (("ranks", "world_size"), ("kernels", "kernel"), frames):
        if table[column].notna().any():
            there = set(table[column].dropna())
            found[option] = [v for v in as_list(cfg.get(option)) if v not in EVERY and v not in there]
    asked = [r for r in as_list((cfg.get("link") or {}).get("ratio")) if isinstance(r, int | float)]
    if table["link_ratio"].notna().any():
        found["link.ratio"] = [r for r in asked if r not in set(table["link_ratio"].dropna())]
    return {option: values for option, values in found.items() if values}


def holes(table: pd.DataFrame) -> str:
    """What there is of the grid that the records' own values make, such as "5 of 6 points"; "" if all of it."""
    axes = [name for name in ("world_size", "frames", "kernel", "link_ratio") if table[name].nunique() > 1]
    if not axes:
        return ""
    there, wanted = len(table[axes].drop_duplicates()), prod(table[name].nunique() for name in axes)
    return f"{there} of {wanted} points of {' x '.join(axes)}" if there < wanted else ""


def whole_points(folder: Path, into: Path) -> Path:
    """Copy a run to `into` as one that asked for no more than it has; its `env.json` says what it lacks (`reduced`).

    Records are appended a point at a time, so a point is there whole or not at all; `contribute` looks once more.

    Raises:
        UsageError: the run has no record, or lacks no value of an option as a whole.
    """
    if not (folder / "records.jsonl").is_file():
        raise UsageError(f"{folder} has no point that is whole yet: go on with resume=<folder>")
    table, cfg, env = records(folder), config(folder), environment(folder)
    if not (lacks := unanswered(table, cfg)):
        raise UsageError(f"{folder} lacks nothing that it asked for: contribute it without --cut-off")
    less = []
    for option, values in lacks.items():
        at, _, name = option.rpartition(".")
        part = cfg[at] if at else cfg
        asked = as_list(part[name])
        part[name] = [value for value in asked if value not in values]
        less.append(f"{len(part[name])} of {len(asked)} {name}")
    env["reduced"] = ", ".join(filter(None, [str(env.get("reduced") or ""), f"cut off with {', '.join(less)}"]))
    into.mkdir(parents=True)
    shutil.copyfile(folder / "records.jsonl", into / "records.jsonl")
    if (folder / "traces").is_dir():
        shutil.copytree(folder / "traces", into / "traces", symlinks=True)
    (into / "config.resolved.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    (into / "env.json").write_text(json.dumps(env, indent=2) + "\n")
    return into
