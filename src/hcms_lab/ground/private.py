"""What no record may tell: secrets, the user's and the machine's name, absolute paths; found, or taken out."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

SECRETS = {
    "a W&B key": r"\b(?:wandb_v\d_[\w-]{20,}|local-[0-9a-f]{40})\b",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})\b",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s:@]+@",
    "an e-mail address": r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b",
}
SECRET_NAME = re.compile(r"(?i)(?:(?:^|_)(?:key|token|pass|credentials?)|api_?key|secret|password|passwd)$")
IDENTITY_NAME = re.compile(r"(?i)^(?:user|username|user_name|login|host|hostname|host_name|nodename|fqdn)$")
HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # W&B's older keys look like commits, so only the run's own commit may stay
_PATH = r"~?/[\w.@+-]+(?:/[\w.@+-]*)+|/(?:home|root|tmp|mnt|work)\b|[A-Za-z]:\\\S+"
ABSOLUTE = re.compile(rf"(?:^|(?<=[\s\"'`=:,;(\[{{<|]))({_PATH}|(?<=file:)/+\S+)")
# Accounts that every machine has name nobody.
_COMMON = {"root", "user", "ubuntu", "admin", "runner", "nobody", "docker", "jovyan", "localhost", "vm", "gpu", "cpu"}


def words() -> dict[str, re.Pattern[str]]:
    """What names this user and this machine, and the values of variables that hold secrets, each by what it is."""
    names = {
        "the user name": _user(),
        "the host name": socket.gethostname(),
        "the host's short name": socket.gethostname().partition(".")[0],
    }
    names = {what: name for what, name in names.items() if name.lower() not in _COMMON and len(name) > 2}
    own = {f"the value of ${k}": v for k, v in os.environ.items() if SECRET_NAME.search(k) and len(v) >= 8}
    return {
        what: re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", re.IGNORECASE)
        for what, name in {**names, **own}.items()
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number that has no name
        return ""


def found(where: str, text: str, commit: str, known: Mapping[str, re.Pattern[str]]) -> Iterator[str]:
    """What a string tells that it should not, a line each; `where` is the dotted name of the value that it is."""
    key = where.rpartition(".")[2]
    if text and SECRET_NAME.search(key):
        yield f"{where} looks like a secret: remove it"
    if text and IDENTITY_NAME.fullmatch(key):
        yield f"{where} names a person or a machine: remove it"
    for what, pattern in SECRETS.items():
        if re.search(pattern, text):
            yield f"{where} holds {what}: remove it"
    if any(match != commit for match in HEX_KEY.findall(text)):
        yield f"{where} holds 40 hexadecimal digits that are not the run's commit: a key?"
    for what, pattern in known.items():
        if pattern.search(text):
            yield f"{where} holds {what}: remove it"
    if match := ABSOLUTE.search(text):
        yield f"{where} holds the absolute path {match[1]}: make it relative or remove it"


def scrubbed(value: Any, known: Mapping[str, re.Pattern[str]] | None = None) -> Any:
    """Plain data with everything of that kind replaced by what it was: `<path>`, `<a W&B key>`, ..."""
    known = words() if known is None else known
    if isinstance(value, str):
        for what, pattern in {**SECRETS, **known}.items():
            value = re.sub(pattern, f"<{what}>", value)
        value = HEX_KEY.sub("<40 hexadecimal digits>", value)
        return ABSOLUTE.sub("<path>", value)
    if isinstance(value, Mapping):
        return {key: _scrubbed_under(str(key), inner, known) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(inner, known) for inner in value]
    return value


def _scrubbed_under(key: str, value: Any, known: Mapping[str, re.Pattern[str]]) -> Any:
    if key == "commit":
        return value
    return "<secret>" if value and SECRET_NAME.search(key) else scrubbed(value, known)
