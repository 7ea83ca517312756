"""Compose an experiment's configuration, check it, run it, record it.

    python experiments/run.py +exp=fig3                     # one experiment
    python experiments/run.py +exp=fig3 frames=[9] ranks=4  # with other settings
    python experiments/run.py +exp=fig3 --cfg job           # show the configuration, run nothing
    python experiments/run.py --list                        # the experiments there are

A bad setting gets one line and exit status 2, before anything starts or is written; a failed case or a wrong result
exits with 1 and keeps all records. Other flags are Hydra's (--help, --cfg, --multirun, --info).
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import is_dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hcms.hardware import hardware, visible_gpus
from hcms_lab.ground.config import Config
from hcms_lab.ground.errors import UsageError
from hcms_lab.measure.cases import device_of
from hcms_lab.report.wandb_mirror import MODES

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"

ConfigStore.instance().store("schema", node=Config)


def experiments() -> dict[str, str]:
    """The experiments and the line that says what each is."""
    found = {}
    for path in sorted((CONF / "exp").glob("*.yaml")):
        comments = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
        found[path.stem] = next((c for c in comments if not c.startswith(("python", "@"))), "")
    return found


SCHEMA = OmegaConf.structured(Config)


def settings(node: Any, schema: Any = SCHEMA, prefix: str = "") -> list[str]:
    """The dotted names of all settings under a node, as deep as the schema says what there is."""
    names = []
    for key in node:
        names.append(prefix + key)
        typed = None if key not in schema or OmegaConf.is_missing(schema, key) else schema[key]
        if OmegaConf.is_dict(typed) and is_dataclass(OmegaConf.get_type(typed)):
            names += settings(node[key], typed, f"{prefix}{key}.")
    return names


def no_such_setting(name: str) -> str:
    near = get_close_matches(name, settings(SCHEMA), n=1)
    return f"{name}: no such setting; " + (
        f"{near[0]} is the nearest" if near else "--cfg job shows those that there are"
    )


def one_line(error: Exception) -> str:
    """What Hydra or OmegaConf says in several lines, as one that names the option, its value and what would do."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}={choice}: choose one of {', '.join(error.options)}"
    first, *_ = str(error).splitlines()
    if match := re.match(r"Could not override '(.+?)'", first):
        if match[1] == "exp":
            return f"exp: write it with a plus, +exp=NAME, one of {', '.join(experiments())}"
        return no_such_setting(match[1])
    if first.startswith("Error merging override") and error.__cause__:
        return f"{first.removeprefix('Error merging override ')}: {str(error.__cause__).splitlines()[0]}"
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())


def refuse(error: UsageError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def composed(overrides: list[str]) -> Config:
    """The typed configuration of these overrides.

    Raises:
        UsageError: no experiment is named, or a key, group or value does not exist.
    """
    GlobalHydra.instance().clear()
    if not any(o.lstrip("+").startswith("exp=") for o in overrides):
        raise UsageError(f"no experiment named: give +exp=NAME, one of {', '.join(experiments())}")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            found = compose("config", overrides)
            # A `+` in front goes past the schema.
            if unknown := set(settings(found)) - set(settings(SCHEMA)):
                raise UsageError(no_such_setting(min(unknown)))
            cfg = OmegaConf.to_object(found)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(one_line(error)) from None
    assert isinstance(cfg, Config)
    return cfg


def script(cfg: Config) -> ModuleType:
    """The module in experiments/ that measures this kind.

    Raises:
        UsageError: there is none of that name.
    """
    try:
        module = import_module(cfg.kind)
    except ModuleNotFoundError as error:
        if error.name != cfg.kind:
            raise
        module = None
    if not hasattr(module, "validate"):
        raise UsageError(f"kind={cfg.kind}: no script in experiments/ measures that; leave it as the experiment has it")
    assert module is not None
    return module


def check(module: ModuleType, cfg: Config) -> None:
    """Refuse what no experiment could use, then what this one could not, and last a folder that cannot be made.

    Raises:
        UsageError: one line on the first such setting.
    """
    if cfg.wandb.mode not in MODES:
        raise UsageError(f"wandb.mode={cfg.wandb.mode}: choose one of {', '.join(MODES)}")
    if not 0 <= cfg.bench.seed < 2**31:
        raise UsageError(f"bench.seed={cfg.bench.seed}: give a whole number from 0 to {2**31 - 1}")
    if cfg.profile is not None and not Path(cfg.profile).is_file():
        raise UsageError(f"profile={cfg.profile}: no such file; +exp=calibrate writes one, and null measures anew")
    if cfg.resume is not None and not (Path(cfg.resume) / "records.jsonl").is_file():
        raise UsageError(f"resume={cfg.resume}: no records.jsonl there; give the folder of an earlier run")
    if cfg.resume is not None:
        _check_same_run(cfg)
    module.validate(cfg)
    if not getattr(module, "WRITES", True):
        return
    try:
        if not cfg.output:
            raise OSError("an empty name")
        Path(cfg.output).mkdir(parents=True, exist_ok=True)
        if not os.access(cfg.output, os.W_OK):
            raise PermissionError("it may not be written")
    except OSError as error:
        why = error.strerror or str(error)
        raise UsageError(f"output={cfg.output}: no folder to write to ({why}); give one that can be made") from None


def _check_same_run(cfg: Config) -> None:
    """Refuse to go on in the folder of another experiment or other hardware, or among the committed records."""
    from hcms_lab.ground.load import config, environment

    folder = Path(str(cfg.resume))
    if (ROOT / "paper_tables") in folder.resolve().parents:
        raise UsageError(f"resume={cfg.resume}: committed records stay as they are; give a run's folder under outputs/")
    theirs = config(folder).get("name", cfg.name)
    if theirs != cfg.name:
        raise UsageError(f"resume={cfg.resume}: that is a run of {theirs}, not of {cfg.name}; give +exp={theirs}")
    slug, here = (environment(folder).get("hardware") or {}).get("slug"), hardware(device_of(cfg)).slug
    if slug not in (None, here):
        raise UsageError(f"resume={cfg.resume}: that run was made on {slug}, and this is {here}; start a new one")


def with_gpus(overrides: list[str]) -> list[str]:
    """Where GPUs are visible: full size unless a workload is named, and the experiment's `on_gpus` first."""
    if not visible_gpus() or "device=cpu" in overrides or composed(overrides).device == "cpu":
        return overrides
    named = any(o.lstrip("+~").startswith("workload=") for o in overrides)
    full_size = [] if named else ["workload=wan720p"]
    return [*composed([*overrides, *full_size]).on_gpus, *overrides, *full_size]


@hydra_main(version_base="1.3", config_path=str(CONF), config_name="config")
def hydra_run(cfg) -> None:
    from hcms_lab.run import run_recorded

    config = OmegaConf.to_object(cfg)
    assert isinstance(config, Config)
    try:
        module = script(config)
        check(module, config)
    except UsageError as error:
        refuse(error)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.resume is not None:
        folder = Path(config.resume)
    try:
        ok = run_recorded(module, config, folder)
    except UsageError as error:  # what only the ranks could tell
        refuse(error)
    if not ok:
        sys.exit(1)


def follow(module: ModuleType, cfg: Config) -> None:
    """Be one of torchrun's other ranks: measure, and leave folder, records and terminal to the first."""
    with (
        TemporaryDirectory() as scratch,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        module.run(cfg, Path(cfg.resume or scratch))


def main(argv: list[str]) -> None:
    if "--list" in argv:
        for name, line in experiments().items():
            print(f"{name:10} {line}")
        return
    if not any(a.startswith("-") for a in argv):
        try:
            overrides = with_gpus(argv)
            cfg = composed(overrides)
            module = script(cfg)
            check(module, cfg)
        except UsageError as error:
            refuse(error)
        if not getattr(module, "WRITES", True):
            sys.exit(0 if module.run(cfg, None) else 1)
        if int(os.environ.get("RANK", 0)) > 0:  # under torchrun the first rank alone writes and prints
            follow(module, cfg)
            return
        GlobalHydra.instance().clear()
        # A resumed run goes on in its own folder.
        sys.argv[1:] = overrides if cfg.resume is None else [*overrides, f"hydra.run.dir='{cfg.resume}'"]
    hydra_run()


if __name__ == "__main__":
    main(sys.argv[1:])
