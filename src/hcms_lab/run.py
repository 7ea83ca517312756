"""The frame of a recorded run: folder, environment, W&B mirror, figure, and the `latest` link."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from hcms.hardware import hardware
from hcms_lab.ground.config import BaseConfig, Config
from hcms_lab.ground.errors import STORAGE, UsageError
from hcms_lab.measure.cases import device_of, link_of
from hcms_lab.measure.environment import environment
from hcms_lab.measure.launch import RankFailed
from hcms_lab.measure.stop import Stopped, stoppable


def run_recorded(module: ModuleType, cfg: BaseConfig, folder: Path) -> bool:
    """Run an experiment's script in its folder; True if every case is ok.

    The folder gets `config.resolved.yaml` and `env.json` first, then what the script records, then the figure or the
    table. When the script has ended, `latest` beside the folder points to it.

    Raises:
        SystemExit: a signal ended it (128 + signal), after one line that says so.
    """
    shown = os.path.relpath(folder)
    try:
        with stoppable():
            return _recorded(module, cfg, folder, shown)
    except Stopped as stopped:
        print(f"error: {stopped}; the records so far are in {shown}", file=sys.stderr)
        sys.exit(stopped.status)
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        what = ": ".join(str(x) for x in (error.filename, error.strerror) if x)
        print(f"error: {what}; the records so far are in {shown}", file=sys.stderr)
        return False


def _recorded(module: ModuleType, cfg: BaseConfig, folder: Path, shown: str) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.resolved.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    device = device_of(cfg)
    link = link_of(cfg) if isinstance(cfg, Config) else "none"  # a prediction, say, exchanges nothing
    env = environment(hardware(device), link, device)
    _write(folder / "env.json", env)
    began_s = perf_counter()
    try:
        with _mirrored(folder, cfg, env) as mirror:
            ok = module.run(cfg, folder)
            # Before anything is drawn: what was measured stays, whatever a picture of it comes to.
            env["wall_s"] = round(perf_counter() - began_s, 1)
            _write(folder / "env.json", env)
            latest = folder.parent / "latest"
            if latest.is_symlink() or not latest.exists():
                latest.unlink(missing_ok=True)
                latest.symlink_to(folder.name)
            figures, tables = [], []
            try:
                figures, tables = _draw(cfg.name, folder), _tabulate(cfg.name, folder)
            except UsageError as error:
                ok = False
                print(f"error: nothing to draw: {error}", file=sys.stderr)
            mirror.finish(figures)
    except RankFailed as failure:
        print(f"\n{failure}\n\nerror: the run failed; its log and its records so far are in {shown}", file=sys.stderr)
        return False
    print(f"wrote {shown}/{'records.jsonl' if (folder / 'records.jsonl').exists() else ''}")
    for path in (*figures, *tables):
        print(f"wrote {os.path.relpath(path)}")
    if not ok:
        print("error: a case failed or gave a wrong result; the table and records say which", file=sys.stderr)
    return ok


def _write(path: Path, env: dict[str, Any]) -> None:
    path.write_text(json.dumps(env, indent=2) + "\n")


def _draw(name: str, folder: Path) -> list[Path]:
    """Draw the experiment's figure into its folder, where it has one (notebooks write figures/)."""
    return _exhibit(name, folder, is_figure=True)


def _tabulate(name: str, folder: Path) -> list[Path]:
    """Write the experiment's table into its folder, where it has one (notebooks write paper_tables/)."""
    return _exhibit(name, folder, is_figure=False)


def _exhibit(name: str, folder: Path, *, is_figure: bool) -> list[Path]:
    from hcms_lab.report.registry import exhibits

    exhibit = exhibits().get(name)
    if exhibit is None or exhibit.is_figure != is_figure or not (folder / "records.jsonl").exists():
        return []
    return exhibit.save(exhibit.of(folder), folder)


@contextmanager
def _mirrored(folder: Path, cfg: BaseConfig, env: dict[str, Any]) -> Iterator[Any]:
    """The W&B mirror, fed with finished cases about once a second while ranks measure."""
    from hcms_lab.report.wandb_mirror import Mirror

    done = Event()
    with Mirror(folder, cfg, env) as mirror:

        def follow() -> None:
            while not done.wait(1.0):
                mirror.poll()

        follower = Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield mirror
        finally:
            done.set()
            follower.join()
