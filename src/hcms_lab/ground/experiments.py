"""The experiments that there are, as conf/exp/*.yaml declare them. Imports no pandas."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hcms_lab.ground.config import AXES, AboutConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.paths import ROOT

_COMMAND = "# python "


@dataclass(frozen=True)
class Experiment:
    """One `conf/exp/<name>.yaml`. `command` is the line at its top, what one types to run it."""

    name: str
    kind: str
    command: str
    title: str
    budget_min: float | None
    gpus: int
    axis: str


def names(root: Path = ROOT) -> list[str]:
    """The names of all experiments: figures first, then tables, then the others, each by number."""

    def place(name: str) -> tuple[int, int, str]:
        match = re.fullmatch(r"(fig|table)(\d+)", name)
        return (["fig", "table"].index(match[1]), int(match[2]), "") if match else (2, 0, name)

    return sorted((path.stem for path in (root / "conf" / "exp").glob("*.yaml")), key=place)


def experiment(name: str, root: Path = ROOT) -> Experiment:
    """What a file of conf/exp/ declares.

    Raises:
        UsageError: no such file, or one that does not say its kind and title.
    """
    path = root / "conf" / "exp" / f"{name}.yaml"
    if name not in names(root):
        raise UsageError(f"exp={name}: choose one of {', '.join(names(root))}")
    text = path.read_text(encoding="utf-8")
    shown = path.relative_to(root)
    try:
        declared: dict[str, Any] = yaml.safe_load(text)
        defaults = [entry for entry in declared.get("defaults") or [] if isinstance(entry, dict)]
        kinds = [entry["/kind"] for entry in defaults if "/kind" in entry]
        if len(kinds) != 1:
            raise UsageError(f"{shown}: its defaults must name one kind, as in `- /kind: microbench`")
        about = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(AboutConfig), declared.get("about") or {}))
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError) as error:
        raise UsageError(f"{shown}: {' '.join(str(error).split())}") from None
    assert isinstance(about, AboutConfig)
    if about.axis not in AXES:
        raise UsageError(f"{shown}: about.axis={about.axis}: choose one of {', '.join(AXES)}")
    command = next((line[2:] for line in text.splitlines() if line.startswith(_COMMAND)), None)
    return Experiment(
        name,
        str(kinds[0]),
        command or f"python experiments/run.py +exp={name}",
        about.title,
        about.budget_min,
        about.gpus,
        about.axis,
    )


def experiments(root: Path = ROOT) -> list[Experiment]:
    """All experiments, in the order of `names`."""
    return [experiment(name, root) for name in names(root)]


def axis(name: str) -> str:
    """The step metric of an experiment in W&B, one of `AXES`; `seq_len` for a name that no file declares."""
    return experiment(name).axis if name in names() else AboutConfig.axis
