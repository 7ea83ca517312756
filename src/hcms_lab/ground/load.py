"""Records as DataFrames: from a run's folder, a file, or the committed reference runs."""

from __future__ import annotations

import os
from dataclasses import fields
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hcms.transport import COLLECTIVE
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.names import peer_kind_by_name
from hcms_lab.ground.paths import ROOT, inside
from hcms_lab.ground.records import SCHEMA, Record, parsed, plan, read_bounded, read_rows

__all__ = [
    "COLUMNS",
    "ROOT",
    "SCHEMAS",
    "by_link",
    "committed_runs",
    "config",
    "environment",
    "judged_runs",
    "newest",
    "newest_runs",
    "plan",
    "records",
    "reduced",
]

SCHEMAS = (SCHEMA,)  # the record schemas that this code reads
MAX_SIDE_BYTES = 1 << 20  # of env.json and config.resolved.yaml
MOST_DEEP = 50  # brackets and blocks of a configuration within each other
NAMED_BY = "HCMS_RUN"  # a run's folder, or `committed`: what `newest` gives in place of the newest run

_FIELDS = {field.name: str(field.type) for field in fields(Record)}
COLUMNS = tuple(_FIELDS)


def records(path: Path | str) -> pd.DataFrame:
    """Read the records of one run.

    Args:
        path: a run's folder, a `records.jsonl`, or a committed `paper_tables/records/<hardware>/<exp>/`.

    Returns one row a case with every column of `COLUMNS` (missing where the record has none) and whatever else the
    lines hold; `times_ms` stays a list; `attrs["folder"]` says where they lie. A last line without its newline was
    being written when its run died: it is left out.

    Raises:
        UsageError: no such file, an empty or too large one, a line that is no record, by its number, or a schema that
            this code does not read.
    """
    path = Path(path)
    file = path / "records.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no records at {file}: give a run's folder, such as outputs/fig3/latest")
    seen = file.stat()
    table = _table(file, seen.st_ino, seen.st_mtime_ns, seen.st_size).copy()
    table.attrs["folder"] = str(file.parent)  # traces lie beside the records
    return table


@lru_cache(maxsize=256)  # verdicts are read from the same runs, one after the other
def _table(file: Path, *stamp: int) -> pd.DataFrame:
    rows = read_rows(file)
    for number, row in enumerate(rows, start=1):
        if row.get("schema") not in SCHEMAS:
            readable = ", ".join(map(str, SCHEMAS))
            raise UsageError(
                f"{file}:{number} has record schema {row.get('schema')!r}, but this version reads {readable}: "
                f"run the experiment again, or read it with the commit named in its env.json"
            )
    if not rows:
        raise UsageError(f"{file} holds no record yet")
    return frame(rows)


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of records as a DataFrame with the columns and types that `records` promises."""
    table = pd.DataFrame(rows)
    table = table.reindex(columns=[*COLUMNS, *(c for c in table.columns if c not in COLUMNS)])
    kinds = table["method"].map(peer_kind_by_name, na_action="ignore")
    table["peer_kind"] = table["peer_kind"].where(table["peer_kind"].notna(), kinds)
    for column, kind in _FIELDS.items():
        if kind.startswith(("int", "float")):
            table[column] = pd.to_numeric(table[column])
        elif kind.startswith("bool"):
            table[column] = table[column].astype("boolean")
        else:
            table[column] = table[column].astype("object").where(table[column].notna(), None)
    return table


def environment(path: Path | str) -> dict[str, Any]:
    """The `env.json` beside a run's records, or {} where there is none."""
    file = _folder(path) / "env.json"
    if not file.is_file():
        return {}
    found = _mapping(parsed(read_bounded(file, MAX_SIDE_BYTES), str(file)), file)
    _check_facts(found, file)
    for segment in found.get("segments") or ():
        _check_facts(_mapping(segment, file), file)
    return found


def _check_facts(facts: dict[str, Any], file: Path) -> None:
    for name, kind in _ENVIRONMENT.items():
        if facts.get(name) is not None and not isinstance(facts[name], kind):
            raise UsageError(f"{file}: {name} is {str(facts[name])[:40]!r}: mend or remove it")
    if started := facts.get("started"):
        try:
            datetime.fromisoformat(started)
        except ValueError:
            raise UsageError(f"{file}: started is {started[:40]!r}, and should be a date") from None


# What is read of an environment; the rest is shown as it is.
_ENVIRONMENT: dict[str, type | tuple[type, ...]] = {
    "hardware": dict,
    "versions": dict,
    "segments": list,
    "started": str,
    "wall_s": (int, float),
}


def hardware_name(path: Path | str) -> str:
    """The hardware of a run as a reader knows it; for a committed variant (another link, say) with that in brackets.

    `paper_tables/records/nvidia-h200-p2p-off/fig3` of the hardware `nvidia-h200` is "NVIDIA H200 (p2p-off)".
    """
    folder, hardware = _folder(path).resolve(), environment(path).get("hardware") or {}
    slug = str(hardware.get("slug") or folder.parent.name)
    name = str(hardware.get("name") or slug)
    variant = folder.parent.name.removeprefix(f"{slug}-")
    return f"{name} ({variant})" if variant != folder.parent.name else name


def config(path: Path | str) -> dict[str, Any]:
    """The `config.resolved.yaml` beside a run's records, or {} where there is none.

    Runs of before the two counts of frames had names of their own get today's: `latent_frames`, but of whole clips.
    """
    file = _folder(path) / "config.resolved.yaml"
    if not file.is_file():
        return {}
    found = _mapping(yaml_of(file), file)
    if "frames" in found and found.get("kind") not in ("wan", "wan_predict"):
        found["latent_frames"] = found.pop("frames")
    return found


def yaml_of(file: Path) -> Any:
    """What a file of YAML holds.

    Raises:
        UsageError: it is too large, no YAML, or of a form that no run of ours writes.
    """
    content = read_bounded(file, MAX_SIDE_BYTES)
    try:
        depth = 0
        for token in yaml.scan(content):  # what opens thousands of brackets takes a scanner for ever
            depth += isinstance(token, _OPENS) - isinstance(token, _CLOSES)
            if depth > MOST_DEEP:
                raise UsageError(f"{file} nests too deep: mend or remove it")
            # A line of aliases of aliases would be gigabytes to whoever walks through it; we write none.
            if isinstance(token, yaml.AliasToken):
                raise UsageError(f"{file} holds YAML aliases, which no run of ours writes: not read")
        return yaml.safe_load(content)
    except UsageError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of a date that no calendar has
        mark = getattr(error, "problem_mark", None)
        raise UsageError(f"{file}{f':{mark.line + 1}' if mark else ''} is not YAML: mend or remove it") from None


_OPENS = (
    *(yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken),
    *(yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken),
)
_CLOSES = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def _mapping(value: Any, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{file} holds a {type(value).__name__}, and should hold names with values")
    return value


def reduced(path: Path | str) -> str:
    """How a run fell short of its experiment's own settings, such as "3 of 10 rounds"; "" where it did not.

    The run itself says so in its `env.json`: what the experiment asks for may be more by now.
    """
    return str(environment(path).get("reduced") or "")


def newest(exp: str, root: Path = ROOT) -> Path:
    """The folder of an experiment's newest records: `outputs/<exp>/latest`, else the newest committed reference run.

    The variable `HCMS_RUN` names another run's folder, or `committed` to leave this machine's own out. A variant
    (another link, other sizes) stands for its experiment only where there is nothing else.

    Raises:
        UsageError: there is none, and which command makes one; or HCMS_RUN names a run of another experiment.
    """
    named = os.environ.get(NAMED_BY)
    if named and named != "committed":
        folder = Path(named) if Path(named).is_dir() else root / named
        theirs = str(records(folder)["exp"].iloc[0])
        if theirs != exp:
            raise UsageError(f"{NAMED_BY}={named} is a run of {theirs}, not of {exp}: name one of {exp}, or none")
        return folder.resolve()
    own = None if named else _own(exp, root)
    if own:
        return own
    folders = committed_folders(exp, root)
    if not folders:
        raise UsageError(f"no records of {exp} yet: run python experiments/run.py +exp={exp}")
    return min(folders.values(), key=_place)


def committed_folders(exp: str, root: Path = ROOT) -> dict[str, Path]:
    """Folders of the committed reference runs of an experiment by hardware slug, in the slugs' order."""
    base = root / "paper_tables" / "records"
    folders = [inside(base, slug.name, exp) for slug in sorted(base.glob("[!.]*")) if slug.is_dir()]
    return {folder.parent.name: folder for folder in folders if (folder / "records.jsonl").is_file()}


def by_link(exp: str, root: Path = ROOT) -> dict[str, Path]:
    """The newest committed run of an experiment over each link, by the link's name, the transport's behind it where it
    is no collective; a reduced one, which says so in its title, only where there is no whole one."""
    folders: dict[str, Path] = {}
    for folder in sorted(
        committed_folders(exp, root).values(), key=lambda folder: (bool(reduced(folder)), _place(folder))
    ):
        link, transport = environment(folder).get("link"), config(folder).get("transport") or COLLECTIVE
        folders.setdefault(str(link) if transport == COLLECTIVE else f"{link}-{transport}", folder)
    return folders


def committed_runs(exp: str, root: Path = ROOT) -> list[pd.DataFrame]:
    """Records of the committed reference runs of an experiment, the newest first, variants last."""
    return [records(folder) for folder in sorted(committed_folders(exp, root).values(), key=_place)]


def newest_runs(exp: str, root: Path = ROOT) -> list[pd.DataFrame]:
    """This machine's newest run, then the committed ones of other hardware, the newest first.

    A reduced run of this machine is left out: nothing is judged by it.
    """
    folder = _own(exp, root)
    if folder is None or reduced(folder):
        return committed_runs(exp, root)
    own = records(folder)
    slug = str(own["hardware"].iloc[0])
    return [own, *(run for run in committed_runs(exp, root) if Path(run.attrs["folder"]).parent.name != slug)]


def judged_runs(exp: str, root: Path = ROOT, *, own: bool = False) -> list[pd.DataFrame]:
    """What verdicts are read from: the committed runs, and this machine's newest only where it is asked for (`own`).

    A reduced run is judged nowhere: neither this machine's, nor one that was committed as a variant.
    """
    runs = newest_runs(exp, root) if own else committed_runs(exp, root)
    return [run for run in runs if not (_is_variant(Path(run.attrs["folder"])) and reduced(run.attrs["folder"]))]


def _place(folder: Path) -> tuple[bool, float]:
    """Sorts committed runs: the newest first, variants last."""
    started = environment(folder).get("started")
    return _is_variant(folder), -datetime.fromisoformat(started).timestamp() if started else 0.0


def _is_variant(folder: Path) -> bool:
    """Whether a run lies under another name than its hardware's, as committed variants do."""
    if folder.parent.parent.name != "records":
        return False
    return (environment(folder).get("hardware") or {}).get("slug", folder.parent.name) != folder.parent.name


def _own(exp: str, root: Path) -> Path | None:
    """The folder of this machine's newest run of an experiment."""
    latest = inside(root / "outputs", exp) / "latest"
    return latest.resolve() if (latest / "records.jsonl").is_file() else None


def _folder(path: Path | str) -> Path:
    path = Path(path)
    return path if path.is_dir() else path.parent
