"""Run one experiment: check its settings, measure, record, draw.

    python experiments/run.py +exp=fig3                            # one experiment
    python experiments/run.py +exp=fig3 latent_frames=[9] ranks=5  # with other settings
    python experiments/run.py --check +exp=fig3 ranks=5            # say whether that could run, start nothing
    python experiments/run.py +exp=fig3 --cfg job                  # show all settings, run nothing

A bad setting gets one line and exit status 2, before anything starts or is written, unless only ranks can tell (a
link.ratio that this machine's own exchange exceeds); a failed case or a wrong result exits with 1 and keeps all
records.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # until `run_recorded`, which has something to end in good order; imports take seconds

    def stopped_early(signum: int, frame: object) -> NoReturn:
        os.write(2, f"error: stopped ({signal.Signals(signum).name})\n".encode())
        os._exit(128 + signum)  # an exception here would go through imports, some of which take any for their own

    # One of torchrun's ranks ends at once: it may be waiting in a collective, where no handler runs.
    handler = signal.SIG_DFL if "TORCHELASTIC_RUN_ID" in os.environ else stopped_early
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, handler)

from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory, TemporaryFile
from textwrap import shorten
from types import ModuleType
from typing import Any, NoReturn

from hydra import main as hydra_main
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from hcms.hardware import visible_gpus
from hcms.methods import METHODS
from hcms_lab.ground import compose
from hcms_lab.ground.checks import one_of, plain_name
from hcms_lab.ground.config import AXES, WANDB_MODES, BaseConfig
from hcms_lab.ground.errors import UsageError, one_line
from hcms_lab.ground.experiments import Experiment, experiment, experiments, names
from hcms_lab.ground.streams import ends_where_nothing_can_be_written, make_usable
from hcms_lab.measure.cases import device_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONF = ROOT / "conf"
CHECK = "--check"
ABOUT_HYDRA = ("--version", "--hydra-help", "--info", "-i", "--shell-completion", "-sc")
HYDRAS = (*ABOUT_HYDRA, "--cfg", "-c", "--package", "-p", "--resolve", "--multirun", "-m")
USED_MOST = {
    "latent_frames=[9,16]": "lengths, in latent frames; whole clips have video frames: frames=33",
    "ranks=4": "how many ranks, which divide the heads; a list, or each for 2, 4 and 8",
    "methods=[ulysses,hcms]": "who is measured",
    "cuts=[even:5,1-3-1,auto]": "how methods that cut heads cut them",
    "workload=wan720p": "the layer, a file of conf/workload/",
    "device=cpu": "GPUs are used where there are some",
    "link.kind=shared": "or auto, native, native-host, ghost, ghost-sm, emulated",
    "link.gbps=5": "the emulated link's bandwidth, in place of link.ratio; slows a ghost's",
    "transport=copy-engine": "between GPUs of one host without NCCL's kernels",
    "gpu=l40s": "which GPUs advise is asked about, or all",
    "link.ratio=0.25": "communication's share of Ulysses, which the emulated link is paced to",
    "bench.iterations=20": "timed calls a case",
    "wandb.mode=disabled": "offline | online | disabled",
    "resume=FOLDER": "go on with a run that was cut off",
}
ROOM_BYTES = 2**20  # what a run's folder takes before its first record, and some
ROOM_FILES = 64

if str(HERE) not in sys.path:  # where the scripts of the kinds are imported from
    sys.path.insert(0, str(HERE))


def help_text() -> str:
    """What `--help` prints: what this is, the experiments, the settings that are used most, where results go."""

    def listed(rows: dict[str, str], width: int) -> str:
        short = {name: shorten(line, 97 - width, placeholder=" …") for name, line in rows.items()}
        return "\n".join(f"  {name:{width}} {line}" for name, line in short.items())

    return f"""\
{(__doc__ or "").strip()}

Experiments (minutes on 2 idle cores):
{listed({f"{e.name:10}{'' if e.budget_min is None else f'{e.budget_min:3g}'}": e.title for e in experiments()}, 13)}

Methods:
{listed({m.name: m.summary for m in METHODS.values()}, 15)}

Settings that are used most:
{listed(USED_MOST, 26)}

Results: outputs/NAME/<date>_<time>/ (records, logs, traces, figure or table) and outputs/NAME/latest, the newest.

Flags: --check, --list, --help; of Hydra: --cfg job, --multirun, --info, --hydra-help.
"""


def named(overrides: list[str]) -> Experiment:
    """The experiment that `+exp=` names.

    Raises:
        UsageError: none, an unknown one, more than one, or `exp=` without its plus.
    """
    if any(o.startswith("exp=") for o in overrides):
        raise UsageError(f"exp: write it with a plus, +exp=NAME, one of {', '.join(names())}")
    chosen = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("exp=")]
    folders = ("hydra.run", "hydra.sweep", "hydra.output_subdir", "hydra=")
    if moved := [o for o in overrides if o.lstrip("+~").startswith(folders)]:
        where = "give output=FOLDER; a run's own folder below that is named after its time"
        raise UsageError(f"{moved[0].partition('=')[0]}: {where}")
    if not chosen:
        raise UsageError(f"no experiment named: give +exp=NAME, one of {', '.join(names())}")
    return experiment(",".join(chosen))


def script(kind: str) -> ModuleType:
    """The module in experiments/ that measures this kind; its `Settings` are known to Hydra from then on.

    Raises:
        UsageError: there is none of that name.
    """
    module = None
    if kind.isidentifier() and (HERE / f"{kind}.py").is_file():
        module = import_module(kind)
    settings = getattr(module, "Settings", None)
    if module is None or settings is None:
        raise UsageError(f"kind={kind}: no script in experiments/ measures that; leave it as the experiment has it")
    compose.add_kind(kind, settings)
    return module


def schema_of(overrides: list[str]) -> type[BaseConfig]:
    """The `Settings` that these overrides are composed with: of the experiment's kind, or of a `kind=` among them."""
    kinds = [named(overrides).kind, *(o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("kind="))]
    return [script(kind).Settings for kind in kinds][-1]


def composed(overrides: list[str]) -> Any:
    """The settings of these overrides, an instance of the `Settings` of their kind.

    Raises:
        UsageError: no experiment is named, or a key, group or value does not exist.
    """
    return compose.composed(CONF, overrides, schema_of(overrides))


def writes(module: ModuleType, cfg: BaseConfig) -> bool:
    """Whether a run has something to record: a script may say so once (`WRITES`) or for its settings (`writes`)."""
    return module.writes(cfg) if hasattr(module, "writes") else getattr(module, "WRITES", True)


def check(module: ModuleType, cfg: BaseConfig, exp: str) -> None:
    """Refuse what no experiment could use, then what this one could not, and last a folder that cannot be made.

    Args:
        exp: the experiment that the settings began as.

    Raises:
        UsageError: one line on the first such setting.
    """
    plain_name("name", cfg.name, "it names the folder below outputs/")
    if cfg.name != exp and cfg.name in names():
        raise UsageError(f"name={cfg.name}: that is another experiment; give +exp={cfg.name}, or a name of your own")
    one_of("wandb.mode", cfg.wandb.mode, WANDB_MODES)
    one_of("about.axis", cfg.about.axis, AXES)
    device_of(cfg)
    if cfg.resume is not None:
        from hcms_lab.resume import check_resume

        check_resume(cfg)
    module.validate(cfg)
    if not writes(module, cfg):
        return
    try:
        if not cfg.output or not cfg.output.isprintable():
            raise OSError("a name of no or of unprintable characters")
        runs = Path(cfg.output) / cfg.name if cfg.resume is None else Path(cfg.resume)
        runs.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=runs):  # what access() says of root is not what a read-only disk says
            pass
        files = os.statvfs(runs)
        if disk_usage(runs).free < ROOM_BYTES or (files.f_files and files.f_favail < ROOM_FILES):
            raise OSError("the disk is full")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"output={cfg.output}: no folder to write to ({why}); give one that can be made") from None


def with_gpus(overrides: list[str]) -> list[str]:
    """Where GPUs are visible, or asked for: full size unless a workload is named, the experiment's `on_gpus` first.

    What the experiment has for the link that it goes over, `on_link`, comes after that.

    `device=cuda` asks for them from a host that has none, for jobs that run elsewhere.
    """
    if "device=cpu" in overrides or not (visible_gpus() or "device=cuda" in overrides):
        return overrides
    plain = composed([f"+exp={named(overrides).name}"])
    if plain.device == "cpu":
        return overrides
    from hcms_lab.measure.cases import default_link

    has_one = any(o.lstrip("+~").startswith("workload=") for o in overrides)
    full_size = [] if has_one or not hasattr(plain, "workload") else ["workload=wan720p"]
    kinds = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("link.kind=")]
    kind = kinds[-1] if kinds else "auto"
    of_link = plain.on_link.get(default_link("cuda") if kind == "auto" else kind, [])
    return [*plain.on_gpus, *of_link, *overrides, *full_size]


def refuse(error: UsageError) -> NoReturn:
    """End with one line."""
    print(one_line(error), file=sys.stderr)
    sys.exit(2)


@hydra_main(version_base="1.3", config_path=str(CONF), config_name="config")
def hydra_run(cfg) -> None:
    config: Any = OmegaConf.to_object(cfg)
    try:
        module = script(config.kind)
        check(module, config, HydraConfig.get().runtime.choices["exp"])
    except UsageError as error:
        refuse(error)
    from hcms_lab.run import run_recorded  # after the checks: it takes its time to import

    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.resume is not None:
        folder = Path(config.resume)
    try:
        ok = run_recorded(module, config, folder, own_settings(config))
    except UsageError as error:  # what only the ranks could tell
        refuse(error)
    if not ok:
        sys.exit(1)


def own_settings(config: BaseConfig) -> Any:
    """What the experiment asks for by itself on such a device, composed inside of a run of Hydra's."""
    outer = GlobalHydra.instance().hydra
    try:
        exp = HydraConfig.get().runtime.choices["exp"]
        link = getattr(config, "link", None)
        over = [f"link.kind={link.kind}"] if link is not None else []
        return composed(with_gpus([f"+exp={exp}", f"device={config.device}", *over]))
    finally:
        GlobalHydra.instance().hydra = outer


def follow(module: ModuleType, cfg: BaseConfig) -> None:
    """Be one of torchrun's other ranks: measure, and leave folder, records and terminal to the first.

    What is refused, all ranks refuse; the first says so.
    """
    with (
        TemporaryDirectory() as scratch,
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        try:
            module.run(cfg, Path(cfg.resume or scratch))
        except UsageError:
            sys.exit(2)


def with_hydras_flags(argv: list[str]) -> None:
    """Leave the command line to Hydra; what it refuses is one line as well."""
    if unknown := [a for a in argv if a.startswith("-") and a.partition("=")[0] not in HYDRAS]:
        raise UsageError(f"{unknown[0]}: no such flag here; --help shows those that there are")
    about_hydra = any(flag in argv for flag in ABOUT_HYDRA)
    overrides = [a for a in argv if "=" in a and not a.startswith("-")]
    schema = BaseConfig if about_hydra else schema_of(overrides)
    for override in (o for o in overrides if o.lstrip("+").startswith("name=")):  # Hydra makes folders of it first
        for name in override.partition("=")[2].split(","):
            plain_name("name", name.strip("'\""), "it names the folder below outputs/")
    if {"--multirun", "-m"} & set(argv):  # a job elsewhere finds the scripts of the kinds as this process does
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    if not about_hydra:
        sys.argv[1:] = [*(a for a in argv if a not in overrides), *with_gpus(overrides)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
    try:
        hydra_run()
    except compose.COMPOSING as error:
        raise UsageError(compose.one_line(error, schema)) from None


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(help_text(), end="")
        return
    if "--list" in argv:
        for e in experiments():
            print(f"{e.name:10} {e.title}")
        return
    try:
        if any(a.startswith("-") and a != CHECK for a in argv):
            with_hydras_flags(argv)
            return
        given = [a for a in argv if a != CHECK]
        overrides = with_gpus(given)
        cfg = composed(overrides)
        module = script(cfg.kind)
        check(module, cfg, named(given).name)
        if CHECK in argv:
            print(f"{cfg.name}: these settings can run")
            return
        if not writes(module, cfg):
            sys.exit(0 if module.run(cfg, None) else 1)
    except UsageError as error:
        refuse(error)
    if int(os.environ.get("RANK", 0)) > 0:  # under torchrun the first rank alone writes and prints
        follow(module, cfg)
        return
    GlobalHydra.instance().clear()
    # A resumed run goes on in its own folder, which keeps the .hydra/ that it began with.
    there = [] if cfg.resume is None else [f"hydra.run.dir='{cfg.resume}'", "hydra.output_subdir=null"]
    sys.argv[1:] = [*overrides, *there]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
    hydra_run()


if __name__ == "__main__":
    make_usable()
    with ends_where_nothing_can_be_written():
        main(sys.argv[1:])
