"""The frame of a recorded run: folder, environment, W&B mirror, figure, and the links that name it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from types import ModuleType
from typing import Any, Literal

from hcms_lab.ground.config import BaseConfig
from hcms_lab.ground.errors import STORAGE, UsageError, storage_line
from hcms_lab.ground.load import environment as read_environment
from hcms_lab.ground.paths import UNFINISHED
from hcms_lab.ground.private import scrubbed
from hcms_lab.ground.reduced import reductions
from hcms_lab.measure.launch import RankFailed
from hcms_lab.measure.stop import Stopped, stoppable
from hcms_lab.resume import add_wall, facts_of, settings_text, with_segment


def run_recorded(module: ModuleType, cfg: BaseConfig, folder: Path, own: BaseConfig) -> bool:
    """Run an experiment's script in its folder; True if every case is ok. `own` is what the experiment itself asks for.

    The folder gets `config.resolved.yaml` and `env.json` first, then what the script records, then the figure or the
    table. Until the script has ended, `unfinished` beside the folder points to it, then `latest`. A resumed run keeps
    its configuration, and `env.json` tells its segments apart.

    Raises:
        SystemExit: a signal ended it (128 + signal), after one line that says so.
    """
    folder = folder.resolve()  # `latest` may have been resumed
    shown = os.path.relpath(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with stoppable(), _alone(folder):
            return _recorded(module, cfg, folder, shown, reductions(cfg, own))
    except Stopped as stopped:
        measured = (folder / "records.jsonl").is_file()
        where = f"the records so far are in {shown}" if measured else "nothing was measured yet"
        print(f"error: {stopped}; {where}", file=sys.stderr)
        sys.exit(stopped.status)
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        print(f"error: {storage_line(error)}; the records so far are in {shown}", file=sys.stderr)
        return False


def _recorded(module: ModuleType, cfg: BaseConfig, folder: Path, shown: str, less: list[str]) -> bool:
    env = scrubbed(facts_of(cfg)) | ({"reduced": ", ".join(less)} if less else {})
    if cfg.resume is not None:
        env = with_segment(read_environment(folder), env, folder)
    else:
        (folder / "config.resolved.yaml").write_text(settings_text(cfg))
    _write(folder / "env.json", env)
    unfinished = folder.parent / UNFINISHED
    earlier = unfinished.resolve() if unfinished.is_symlink() else folder  # one that was cut off, and stays so
    _link(unfinished, folder)
    began_s = perf_counter()
    source: Any = getattr(module, "SOURCE", "measured")

    def note_wall() -> None:
        add_wall(env, perf_counter() - began_s)
        _write(folder / "env.json", env)

    try:
        with _mirrored(folder, cfg, env, source) as mirror:
            try:
                ok = module.run(cfg, folder)
            except BaseException:
                with suppress(OSError):  # what ended the run says more than a full disk here
                    note_wall()
                raise
            note_wall()  # before anything is drawn: what was measured stays, whatever a picture of it comes to
            _link(folder.parent / "latest", folder)
            _unlink(unfinished, folder)
            if earlier != folder and earlier.is_dir() and earlier.parent == folder.parent:
                _link(unfinished, earlier)
            figures, tables = [], []
            try:
                figures, tables = _draw(cfg.name, folder), _tabulate(cfg.name, folder)
            except UsageError as error:
                ok = False
                print(f"error: nothing to draw: {error}", file=sys.stderr)
            mirror.finish(figures)
    except RankFailed as failure:
        print(f"\n{failure}\n\nto go on: the same command with resume={_given(folder)}", file=sys.stderr)
        print(f"error: the run failed; its log and its records so far are in {shown}", file=sys.stderr)
        return False
    if less:
        print(f"note: a reduced run ({', '.join(less)}): drawn with that in its title, judged nowhere")
    print(f"wrote {shown}/{'records.jsonl' if (folder / 'records.jsonl').exists() else ''}")
    for path in (*figures, *tables):
        print(f"wrote {os.path.relpath(path)}")
    if not ok:
        print("error: a case failed or gave a wrong result; the table and records say which", file=sys.stderr)
    return ok


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a folder in which another process is at work; the lock goes with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            flock(handle, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{os.path.relpath(folder)}: another process is at work there; wait for its end") from None
        yield
    finally:
        os.close(handle)


def _link(link: Path, folder: Path) -> None:
    """Point a link beside the folder to it, in one step; what is no link stays."""
    if link == folder or (link.exists() and not link.is_symlink()):
        return
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    new.replace(link)


def _unlink(link: Path, folder: Path) -> None:
    if link.is_symlink() and link.readlink() == Path(folder.name):
        link.unlink()


def _given(folder: Path) -> str:
    """A run that was cut off as one would name it."""
    link = folder.parent / UNFINISHED
    return os.path.relpath(link if link.is_symlink() and link.resolve() == folder else folder)


def _write(path: Path, env: dict[str, Any]) -> None:
    whole = path.with_suffix(".whole")
    whole.write_text(json.dumps(env, indent=2) + "\n")
    whole.replace(path)


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
def _mirrored(
    folder: Path, cfg: BaseConfig, env: dict[str, Any], source: Literal["measured", "predicted"]
) -> Iterator[Any]:
    """The W&B mirror, fed with finished cases about once a second while ranks measure."""
    from hcms_lab.report.wandb_mirror import Mirror

    done = Event()
    with Mirror(folder, cfg, env, source=source) as mirror:

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
