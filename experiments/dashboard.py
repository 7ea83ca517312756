"""Build the W&B workspace and report in which hardware types are overlaid.

    python experiments/dashboard.py entity=NAME project=NAME             # save both to W&B; takes a key
    python experiments/dashboard.py entity=NAME project=NAME --dry-run   # print them as JSON; no key, no network

Options are those of conf/dashboard.yaml. Exit status 2 where an option is wrong or W&B cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hcms_lab.ground.paths import ROOT
from hcms_lab.report.dashboard import as_json, report, workspace
from hcms_lab.report.wandb_mirror import reach

DRY_RUN = "python experiments/dashboard.py --dry-run shows what would be saved without one"


@dataclass
class Options:
    entity: str | None = None
    project: str = "hcms"
    name: str = "HCMS across hardware"


def refuse(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", nargs="*", metavar="key=value", help="entity, project, name")
    parser.add_argument("--dry-run", action="store_true", help="print workspace and report as JSON, save nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository whose records are shown")
    arguments = parser.parse_args(argv)
    try:
        from_file, typed = OmegaConf.load(ROOT / "conf" / "dashboard.yaml"), OmegaConf.from_cli(arguments.options)
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), from_file, typed))
    except OmegaConfBaseException as error:
        refuse(f"{' '.join(str(error).split())} Options: entity, project, name.")
    assert isinstance(options, Options)
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        refuse("wandb-workspaces is not installed: pip install -e '.[lab]'")

    if arguments.dry_run:
        entity = options.entity or "ENTITY"
        views = {
            "workspace": as_json(workspace(entity, options.project, options.name, arguments.root)),
            "report": as_json(report(entity, options.project, options.name, arguments.root)),
        }
        print(json.dumps(views, indent=1, ensure_ascii=False))
        return

    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        if not wandb.login(prompt=False, verify=False):
            refuse(f"no W&B key: run `wandb login`, or set WANDB_API_KEY; {DRY_RUN}")
        reach(wandb.setup().settings.base_url)
        entity = options.entity or wandb.Api().default_entity
        if entity is None:
            refuse("the account has no default entity: give entity=NAME")
        for view in (
            workspace(entity, options.project, options.name, arguments.root),
            report(entity, options.project, options.name, arguments.root),
        ):
            view.save()
            print(f"saved {view.url}")
    except Exception as error:  # the library raises whatever the server's answer led to
        refuse(f"W&B did not take it ({str(error).splitlines()[0] if str(error) else type(error).__name__}); {DRY_RUN}")


if __name__ == "__main__":
    main()
