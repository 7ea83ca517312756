"""Check that a run is fit to be published, and place it among the committed reference runs.

What is copied: `records.jsonl`, `env.json`, `config.resolved.yaml` and `traces/`, to
`paper_tables/records/<hardware>/<exp>/`. Logs and W&B's files stay where they are.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from hcms.schedule.cut import format_cut, parse_cut
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.load import config, environment, plan, records
from hcms_lab.ground.paths import ROOT

FILES = ("records.jsonl", "env.json", "config.resolved.yaml")
MAX_MIB = 8.0  # of one run: a trace of one iteration is small, a trace of them all does not belong in a repository

_NEEDED = ("commit", "dirty", "hardware", "link", "python", "torch", "versions", "started")
_SECRETS = {
    "a W&B key": r"\b(?:wandb_v\d_[\w-]{20,}|local-[0-9a-f]{40})\b",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})\b",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s:@]+@",
    "an e-mail address": r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b",
}
GATHERING = ("hardware_types", "wan_predict")  # they gather other runs' records and predict: no grid of cases
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]*")
_HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # W&B's older keys look like commits, so only the run's own commit may stay
_SECRET_NAME = re.compile(r"(?i)(?:^|_)(?:api_?key|key|token|secret|password|passwd|credentials?)$")
_IDENTITY_NAME = re.compile(r"(?i)^(?:user|username|user_name|login|host|hostname|host_name|nodename|fqdn)$")
_ABSOLUTE = re.compile(
    r"(?:^|[\s\"'=:,;(\[])(~?/[\w.@+-]+(?:/[\w.@+-]*)+|/(?:home|root|tmp|mnt|work)\b|[A-Za-z]:\\\S+)"
)
# Accounts that every machine has name nobody.
_COMMON = {"root", "user", "ubuntu", "admin", "runner", "nobody", "docker", "jovyan", "localhost", "vm", "gpu", "cpu"}


def problems(folder: Path) -> list[str]:
    """Everything that keeps a run from being published, a line each; [] if nothing does."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        return [f"{name} is missing: give the folder of a whole run, such as outputs/fig3/latest" for name in missing]
    try:
        table = records(folder)
    except UsageError as error:
        return [str(error)]
    env = environment(folder)
    return [
        *_environment(env),
        *_incomplete(table, config(folder)),
        *_wrong(table, env, config(folder)),
        *_private(folder, env),
    ]


def place(folder: Path, root: Path = ROOT, *, variant: str | None = None, replace: bool = False) -> Path:
    """Copy a run that has no problems to `paper_tables/records/<hardware>/<exp>/` under `root`; returns that folder.

    Args:
        variant: what sets this run apart from others of the same hardware, such as `p2p-off`: the run then lies
            under `<hardware>-<variant>`.

    Raises:
        UsageError: the run has problems, such a run is there already and `replace` is False, or `variant` is not
            made of lower-case letters, digits and hyphens.
    """
    if variant is not None and not _SLUG.fullmatch(variant):
        raise UsageError(f"--variant {variant}: give lower-case letters, digits and hyphens, such as p2p-off")
    found = problems(folder)
    if found:
        raise UsageError("; ".join(found))
    table = records(folder)
    slug = str(environment(folder)["hardware"]["slug"]) + (f"-{variant}" if variant else "")
    target = root / "paper_tables" / "records" / slug / str(table["exp"].iloc[0])
    if target.exists() and not replace:
        raise UsageError(f"{os.path.relpath(target)} is there already: --replace puts this run in its place")
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(folder / name, target / name)
    for trace in _traces(folder):
        copy = target / trace.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trace, copy)
    return target


def _environment(env: Mapping[str, Any]) -> Iterator[str]:
    for key in _NEEDED:
        if env.get(key) is None:
            yield f"env.json has no {key}: run the experiment again with this version"
    hardware = env.get("hardware") or {}
    for key in ("name", "slug", "count"):
        if not hardware.get(key):
            yield f"env.json has no hardware.{key}"
    if not _SLUG.fullmatch(str(hardware.get("slug", ""))):
        yield f"hardware.slug {hardware.get('slug')!r} is not lower-case letters, digits and hyphens"
    if env.get("dirty"):
        yield "the run's code differs from its commit (dirty): commit the changes, then run again"
    if env.get("commit") is not None and not _HEX_KEY.fullmatch(str(env["commit"])):
        yield f"commit {env['commit']!r} is not a full commit hash"


def _incomplete(table: pd.DataFrame, cfg: Mapping[str, Any]) -> Iterator[str]:
    """What the configuration asked for and no record answers."""
    if cfg.get("kind") in GATHERING:
        return
    # A clip's configuration counts video frames, its records latent ones as well.
    frames = ("frames", "num_frames") if "num_frames" in table else ("latent_frames", "frames")
    for option, column in (("ranks", "world_size"), ("kernels", "kernel"), frames):
        # `each` and `all` ask for what the machine has.
        absent = set(_listed(cfg.get(option))) - {"each", "all"} - set(table[column].dropna())
        if absent and table[column].notna().any():
            yield f"incomplete: no record with {option}={_text(absent)}; go on with resume=<folder>"
    ratios = {r for r in _listed((cfg.get("link") or {}).get("ratio")) if isinstance(r, int | float)}
    if table["link_ratio"].notna().any() and ratios - set(table["link_ratio"].dropna()):
        yield f"incomplete: no record with link.ratio={_text(ratios - set(table['link_ratio'].dropna()))}"
    entries = [str(entry).partition("@") for entry in _listed(cfg.get("methods"))]
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
            for cut in [own_cut] if own_cut else _listed(cfg.get("cuts")):
                if (method, "auto" if cut == "auto" else _cut(cut, cases)) not in there:
                    yield f"incomplete: {method} has no record with the cut {cut} at {where}"


def _wrong(table: pd.DataFrame, env: Mapping[str, Any], cfg: Mapping[str, Any]) -> Iterator[str]:
    for row in table[~table["ok"].fillna(False)].to_dict("records"):
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
    commit = str(env.get("commit"))
    names = {
        "the user name": getpass.getuser(),
        "the host name": socket.gethostname(),
        "the host's short name": socket.gethostname().partition(".")[0],
    }
    own = {f"the value of ${k}": v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= 8}
    words = {
        what: re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", re.IGNORECASE)
        for what, name in {**{w: n for w, n in names.items() if n.lower() not in _COMMON and len(n) > 2}, **own}.items()
    }
    for path in [*(folder / name for name in FILES), *traces]:
        shown = path.relative_to(folder)
        seen: set[str] = set()
        for where, text in _strings(path):
            for line in _look(where, text, commit, words):
                if line not in seen:
                    seen.add(line)
                    yield f"{shown}: {line}"


def _look(where: str, text: str, commit: str, words: Mapping[str, re.Pattern[str]]) -> Iterator[str]:
    key = where.rpartition(".")[2]
    if text and _SECRET_NAME.search(key):
        yield f"{where} looks like a secret: remove it"
    if text and _IDENTITY_NAME.fullmatch(key):
        yield f"{where} names a person or a machine: remove it"
    for what, pattern in _SECRETS.items():
        if re.search(pattern, text):
            yield f"{where} holds {what}: remove it"
    if any(match != commit for match in _HEX_KEY.findall(text)):
        yield f"{where} holds 40 hexadecimal digits that are not the run's commit: a key?"
    for what, pattern in words.items():
        if pattern.search(text):
            yield f"{where} holds {what}: remove it"
    if match := _ABSOLUTE.search(text):
        yield f"{where} holds the absolute path {match[1]}: make it relative or remove it"


def _strings(path: Path) -> Iterator[tuple[str, str]]:
    """Every key path and string of a JSON, JSON-lines or YAML file; the lines of any other."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".jsonl":
        values: list[Any] = [json.loads(line) for line in text.splitlines() if line.strip()]
    elif path.suffix == ".json":
        values = [json.loads(text)]
    elif path.suffix in (".yaml", ".yml"):
        values = [yaml.safe_load(text)]
    else:
        values = text.splitlines()
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
    return sorted(path for path in (folder / "traces").rglob("*") if path.is_file())


def _cut(cut: Any, cases: pd.DataFrame) -> str | None:
    heads = int(cases["heads"].iloc[0]) // int(cases["world_size"].iloc[0])
    try:
        return format_cut(parse_cut(cut, heads))
    except ValueError:
        return None


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _text(values: set[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(values))
