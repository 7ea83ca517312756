"""Check that a run is fit to be published, and place it among the committed reference runs.

What is copied: `records.jsonl`, `env.json`, `config.resolved.yaml` and `traces/`, to
`paper_tables/records/<hardware>/<exp>/`. Logs and W&B's files stay where they are.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from hcms.schedule.cut import parse_shape
from hcms_lab.ground import private
from hcms_lab.ground.checks import as_list
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import config, environment, plan, records, reduced, yaml_of
from hcms_lab.ground.names import PEER
from hcms_lab.ground.paths import ROOT, inside
from hcms_lab.ground.private import words
from hcms_lab.ground.records import parsed, read_bounded, read_rows, repeated
from hcms_lab.report.cut_off import holes, unanswered

FILES = ("records.jsonl", "env.json", "config.resolved.yaml")
MAX_MIB = 8.0  # of one run: a trace of one iteration is small, a trace of them all does not belong in a repository

_NEEDED = ("commit", "dirty", "hardware", "link", "python", "torch", "versions", "started")
# Kinds without a grid of cases: they gather other runs' records and predict, or measure a card's parts.
GATHERING = ("hardware_types", "wan_predict", "gpu_one")
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def problems(folder: Path) -> list[str]:
    """Everything that keeps a run from being published, a line each; [] if nothing does."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        return [f"{name} is missing: give the folder of a whole run, such as outputs/fig3/latest" for name in missing]
    try:
        table, env, cfg = records(folder), environment(folder), config(folder)
        return [
            *_environment(env),
            *_incomplete(table, cfg),
            *_wrong(table, env, cfg),
            *_private(folder, env),
            *_repeated(folder, cfg),
        ]
    except UsageError as error:  # a file that cannot be read as what it should be
        return [str(error)]


def _repeated(folder: Path, cfg: Mapping[str, Any]) -> Iterator[str]:
    if cfg.get("kind") not in GATHERING and (count := repeated(read_rows(folder / "records.jsonl"))):
        yield f"{count} records are of a case that has one already: leave one of each"


def check_variant(variant: str | None) -> None:
    """Refuse a variant's name that is not made of lower-case letters, digits and hyphens."""
    if variant is not None and not _SLUG.fullmatch(variant):
        raise UsageError(f"--variant {variant}: give lower-case letters, digits and hyphens, such as p2p-off")


def place(folder: Path, root: Path = ROOT, *, variant: str | None = None, replace: bool = False) -> Path:
    """Copy a run that has no problems to `paper_tables/records/<hardware>/<exp>/` under `root`; returns that folder.

    What it replaces stays until the copy is whole, and comes back with the next call where this one was killed between.

    Args:
        variant: what sets this run apart from others of the same hardware, such as `p2p-off`: the run then lies
            under `<hardware>-<variant>`, and may be of another size.

    Raises:
        UsageError: the run has problems, is a reduced one that no variant sets apart, would replace a run that has more
            rounds or cases, such a run is there already and `replace` is False, or `variant` is not made of lower-case
            letters, digits and hyphens.
    """
    check_variant(variant)
    base = root / "paper_tables" / "records"
    if base.resolve() in folder.resolve().parents:
        raise UsageError(f"{os.path.relpath(folder)} is among the committed records already: give a run's folder")
    found = problems(folder)
    if found:
        raise UsageError("; ".join(found))
    table = records(folder)
    slug = str(environment(folder)["hardware"]["slug"]) + (f"-{variant}" if variant else "")
    target = inside(base, slug, str(table["exp"].iloc[0]))
    beside = "--variant NAME puts it beside the others, under a name that says so"
    if variant is None and (less := reduced(folder)):
        raise UsageError(f"a reduced run ({less}): {beside}; or run the experiment with its own settings")
    staging = inside(root / "paper_tables", "contributing")
    new, old = staging / f"{slug}.{target.name}.new", staging / f"{slug}.{target.name}.old"
    _bring_back(staging, base)
    if target.exists() and not replace:
        raise UsageError(f"{os.path.relpath(target)} is there already: --replace puts this run in its place")
    if target.exists() and (less := _less(table, records(target))):
        raise UsageError(f"{os.path.relpath(target)} has more ({less}): {beside}")
    for left in (new, old):
        if left.is_symlink():
            left.unlink()
        shutil.rmtree(left, ignore_errors=True)
    for path in [*(folder / name for name in FILES), *_traces(folder)]:
        copy = new / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy, follow_symlinks=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):  # what another call left there is that one's
        staging.rmdir()
    return target


def _bring_back(staging: Path, base: Path) -> None:
    """Put back what a call that was killed had taken away, and had not yet replaced."""
    for old in staging.glob("*.old"):
        target = inside(base, *old.name.removesuffix(".old").split(".", 1))
        if not target.exists():
            old.rename(target)


def _less(run: pd.DataFrame, than: pd.DataFrame) -> str:
    """What a run has less of than another, such as "3 of 10 rounds, 10 of 40 cases"; "" where it has no less."""
    less = []
    rounds = [int(table["n"].min()) if table["n"].notna().any() else 0 for table in (run, than)]
    for name, (mine, theirs) in {"rounds": rounds, "cases": (len(run), len(than))}.items():
        if mine < theirs:
            less.append(f"{mine} of {theirs} {name}")
    return ", ".join(less)


def _environment(env: Mapping[str, Any]) -> Iterator[str]:
    told = {"dirty"} if env.get("commit_told") else set()  # a copy without its history cannot say
    for key in _NEEDED:
        if env.get(key) is None and key not in told:
            yield f"env.json has no {key}: run the experiment again with this version"
    hardware = env.get("hardware") or {}
    for key in ("name", "slug", "count"):
        if not hardware.get(key):
            yield f"env.json has no hardware.{key}"
    if not _SLUG.fullmatch(str(hardware.get("slug", ""))):
        yield f"hardware.slug {hardware.get('slug')!r} is not lower-case letters, digits and hyphens"
    segments = env.get("segments")
    parts = [env, *(segments if isinstance(segments, list) else [])]
    if any(isinstance(part, Mapping) and part.get("dirty") for part in parts):
        yield "the run's code differs from its commit (dirty): commit the changes, then run again"
    if env.get("commit") is not None and not _COMMIT.fullmatch(str(env["commit"])):
        yield f"commit {env['commit']!r} is not a full commit hash"


def _incomplete(table: pd.DataFrame, cfg: Mapping[str, Any]) -> Iterator[str]:
    """What the configuration asked for and no record answers."""
    if cfg.get("kind") in GATHERING:
        return
    for option, values in unanswered(table, cfg).items():
        yield f"incomplete: no record with {option}={_text(set(values))}; go on with resume=<folder>, or give --cut-off"
    if less := holes(table):
        yield f"incomplete: {less}; go on with resume=<folder>"
    entries = [str(entry).partition("@") for entry in as_list(cfg.get("methods"))]
    for point, cases in table.groupby(["world_size", "seq_len", "kernel", "dtype", "link_ratio"], dropna=False):
        where = f"{point[0]:g} ranks, {point[1]:g} tokens"
        there = {(method, plan(cut) or "") for method, cut in zip(cases["method"], cases["cut"], strict=True)}
        methods = {method for method, _ in there}
        for method, _, own_cut in entries:
            if method not in methods:
                yield f"incomplete: {method} was asked for, and has no record at {where}"
                continue
            if not any(cut for name, cut in there if name == method):
                continue
            for cut in [own_cut] if own_cut else as_list(cfg.get("cuts")):
                if (method, "auto" if cut == "auto" else _cut(cut, cases)) not in there:
                    yield f"incomplete: {method} has no record with the cut {cut} at {where}"


def _wrong(table: pd.DataFrame, env: Mapping[str, Any], cfg: Mapping[str, Any]) -> Iterator[str]:
    # A peer's wrong result is a finding where it has no time, and Table 5 says why.
    finding = table["method"].str.startswith(PEER) & table["latency_ms"].isna()
    for row in table[~finding & ~table["ok"].fillna(False)].to_dict("records"):
        why = row["error"] or "wrong result"
        yield f"not ok: {row['method']} {row['cut'] or ''} at {row['seq_len']} tokens: {str(why).splitlines()[-1]}"
    if cfg.get("kind") in GATHERING:
        return
    if table["latency_ms"].isna().all():
        yield "nothing was measured: every case was refused"
    if table["exp"].nunique() != 1:
        yield f"records of several experiments in one folder: {_text(set(table['exp']))}"
    slug = (env.get("hardware") or {}).get("slug")
    others = set(table.loc[table["source"] == "measured", "hardware"].dropna()) - {slug}
    if others:
        yield f"records of {_text(others)}, but env.json says {slug}"


def _private(folder: Path, env: Mapping[str, Any]) -> Iterator[str]:
    """Secrets, names of people and machines, and absolute paths in what would be copied."""
    traces = _traces(folder)
    size_mib = sum(path.stat().st_size for path in [*(folder / name for name in FILES), *traces]) / 2**20
    if size_mib > MAX_MIB:
        yield f"{size_mib:.1f} MiB with its traces, and {MAX_MIB:g} MiB is the limit: remove traces of repeated cases"
    commit, known = str(env.get("commit")), words()
    for path in [*(folder / name for name in FILES), *traces]:
        shown = path.relative_to(folder)
        if path.is_symlink():
            yield f"{shown} is a link: put the file itself there"
            continue
        seen: set[str] = set()
        for where, text in _strings(path):
            for line in private.found(where, text, commit, known):
                if line not in seen:
                    seen.add(line)
                    yield f"{shown}: {line}"


def _strings(path: Path) -> Iterator[tuple[str, str]]:
    """Every key path and string of a JSON, JSON-lines or YAML file; the lines of any other."""
    if path.suffix == ".jsonl":
        values: list[Any] = list(read_rows(path))
    elif path.suffix == ".json":
        values = [parsed(read_bounded(path), str(path))]
    elif path.suffix in (".yaml", ".yml"):
        values = [config(path.parent) if path.name == "config.resolved.yaml" else yaml_of(path)]
    else:
        values = list(read_bounded(path).decode(errors="replace").splitlines())
    for value in values:
        yield from _leaves("", value)


def _leaves(where: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield where, str(key)
            yield from _leaves(f"{where}.{key}".lstrip("."), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(where, inner)
    elif isinstance(value, str):
        yield where, value


def _traces(folder: Path) -> list[Path]:
    """Its traces. A link is none of them, whatever it leads to."""
    if (folder / "traces").is_symlink():
        raise UsageError(f"{os.path.relpath(folder / 'traces')} is a link: put the folder itself there")
    return sorted(path for path in (folder / "traces").rglob("*") if path.is_file())


def _cut(cut: Any, cases: pd.DataFrame) -> str | None:
    heads = int(cases["heads"].iloc[0]) // int(cases["world_size"].iloc[0])
    try:
        return str(parse_shape(cut, heads))
    except ValueError:
        return None


def _text(values: set[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(values))
