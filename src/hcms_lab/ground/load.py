"""Records as DataFrames: from a run's folder, a file, or the committed reference runs."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.names import peer_kind_by_name
from hcms_lab.ground.paths import ROOT
from hcms_lab.ground.records import SCHEMA, Record

__all__ = [
    "COLUMNS",
    "ROOT",
    "SCHEMAS",
    "committed_runs",
    "config",
    "environment",
    "newest",
    "newest_runs",
    "records",
]

SCHEMAS = (SCHEMA,)  # the record schemas that this code reads

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
        UsageError: no such file, an empty one, a line that is not JSON, or a schema that this code does not read.
    """
    path = Path(path)
    file = path / "records.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no records at {file}: give a run's folder, such as outputs/fig3/latest")
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{file}:{number} is not JSON ({error.msg}): mend or remove that line") from None
        if row.get("schema") not in SCHEMAS:
            readable = ", ".join(map(str, SCHEMAS))
            raise UsageError(
                f"{file}:{number} has record schema {row.get('schema')!r}, but this version reads {readable}: "
                f"run the experiment again, or read it with the commit named in its env.json"
            )
        rows.append(row)
    if not rows:
        raise UsageError(f"{file} holds no record yet")
    table = frame(rows)
    table.attrs["folder"] = str(file.parent)  # traces lie beside the records
    return table


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
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


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
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "frames" in found and found.get("kind") not in ("wan", "wan_predict"):
        found["latent_frames"] = found.pop("frames")
    return found


def newest(exp: str, root: Path = ROOT) -> Path:
    """The folder of an experiment's newest records: `outputs/<exp>/latest`, else the newest committed reference run.

    A variant (another link, other sizes) stands for its experiment only where there is nothing else.

    Raises:
        UsageError: neither exists; the message says which command makes one.
    """
    own = _own(exp, root)
    if own:
        return own
    folders = committed_folders(exp, root)
    if not folders:
        raise UsageError(f"no records of {exp} yet: run python experiments/run.py +exp={exp}")
    return min(folders.values(), key=_place)


def committed_folders(exp: str, root: Path = ROOT) -> dict[str, Path]:
    """Folders of the committed reference runs of an experiment by hardware slug, in the slugs' order."""
    files = sorted((root / "paper_tables" / "records").glob(f"*/{exp}/records.jsonl"))
    return {file.parent.parent.name: file.parent for file in files}


def committed_runs(exp: str, root: Path = ROOT) -> list[pd.DataFrame]:
    """Records of the committed reference runs of an experiment, the newest first, variants last."""
    return [records(folder) for folder in sorted(committed_folders(exp, root).values(), key=_place)]


def newest_runs(exp: str, root: Path = ROOT) -> list[pd.DataFrame]:
    """This machine's newest run, then the committed ones of other hardware, the newest first."""
    folder = _own(exp, root)
    if folder is None:
        return committed_runs(exp, root)
    own = records(folder)
    slug = str(own["hardware"].iloc[0])
    return [own, *(run for run in committed_runs(exp, root) if Path(run.attrs["folder"]).parent.name != slug)]


def plan(cut: str | None) -> str | None:
    """The cut that was asked for: `"auto:1-3-1"`, chosen on the machine, is `"auto"` on every machine."""
    return "auto" if isinstance(cut, str) and cut.startswith("auto") else cut


def _place(folder: Path) -> tuple[bool, float]:
    """Sorts committed runs: the newest first, variants last."""
    env = environment(folder)
    started = env.get("started")
    is_variant = (env.get("hardware") or {}).get("slug", folder.parent.name) != folder.parent.name
    return is_variant, -datetime.fromisoformat(started).timestamp() if started else 0.0


def _own(exp: str, root: Path) -> Path | None:
    """The folder of this machine's newest run of an experiment."""
    latest = root / "outputs" / exp / "latest"
    return latest.resolve() if (latest / "records.jsonl").is_file() else None


def _folder(path: Path | str) -> Path:
    path = Path(path)
    return path if path.is_dir() else path.parent
