"""Build the W&B workspace and report in which hardware types are overlaid.

    hcms-lab dashboard entity=NAME project=NAME             # save both to W&B; takes a key
    hcms-lab dashboard entity=NAME project=NAME --dry-run   # print them as JSON; no key, no network

Options are those of conf/dashboard.yaml. Exit status 2 where an option is wrong or W&B cannot be reached.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.paths import ROOT

DRY_RUN = "hcms-lab dashboard --dry-run shows what would be saved without one"


@dataclass
class Options:
    entity: str | None = None
    project: str = "hcms"
    name: str = "HCMS across hardware"


def options(parser: ArgumentParser) -> None:
    parser.add_argument("options", nargs="*", metavar="key=value", help="entity, project, name")
    parser.add_argument("--dry-run", action="store_true", help="print workspace and report as JSON, save nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository whose records are shown")


def run(arguments: Namespace) -> int:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from hcms_lab.report.dashboard import as_json, report, workspace
    from hcms_lab.report.wandb_mirror import reach

    try:
        from_file, typed = OmegaConf.load(ROOT / "conf" / "dashboard.yaml"), OmegaConf.from_cli(arguments.options)
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), from_file, typed))
    except OmegaConfBaseException as error:
        raise UsageError(f"{' '.join(str(error).split())} Options: entity, project, name.") from None
    assert isinstance(options, Options)
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise UsageError("wandb-workspaces is not installed: pip install -e '.[lab]'") from None

    if arguments.dry_run:
        entity = options.entity or "ENTITY"
        views = {
            "workspace": as_json(workspace(entity, options.project, options.name, arguments.root)),
            "report": as_json(report(entity, options.project, options.name, arguments.root)),
        }
        print(json.dumps(views, indent=1, ensure_ascii=False))
        return 0

    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        if not wandb.login(prompt=False, verify=False):
            raise UsageError(f"no W&B key: run `wandb login`, or set WANDB_API_KEY; {DRY_RUN}")
        reach(wandb.setup().settings.base_url)
        entity = options.entity or wandb.Api().default_entity
        if entity is None:
            raise UsageError("the account has no default entity: give entity=NAME")
        for view in (
            workspace(entity, options.project, options.name, arguments.root),
            report(entity, options.project, options.name, arguments.root),
        ):
            view.save()
            print(f"saved {view.url}")
    except UsageError:
        raise
    except Exception as error:  # the library raises whatever the server's answer led to
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"W&B did not take it ({why}); {DRY_RUN}") from None
    return 0
