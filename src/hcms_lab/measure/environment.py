"""What explains a run: commit, hardware, link, versions and an allow-list of variables, never all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hcms.hardware import Hardware
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.paths import ROOT
from hcms_lab.measure.one_card import NCCL, is_one_card, nccl_version

VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "NCCL_MAX_CTAS",
    "NCCL_MULTI_RANK_GPU_ENABLE",
    "NCCL_P2P_DISABLE",
    "NCCL_MAX_P2P_NCHANNELS",
    "NCCL_NVLS_ENABLE",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "OMP_NUM_THREADS",
    "TORCH_NCCL_HIGH_PRIORITY",
)
PACKAGES = (
    "hcms",
    "torch",
    "numpy",
    "hydra-core",
    "diffusers",
    "deepspeed",
    "flash-attn",
    "sageattention",
    "yunchang",
    "flashinfer-python",
)


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def code(root: Path = ROOT) -> str:
    """What tells this code from any other, committed or not: a run goes on only with the same."""
    files = [*(root / "src").rglob("*.py"), *(root / "src").rglob("*.yaml"), *(root / "conf").rglob("*.yaml")]
    digest = sha256()
    for path in sorted([*files, *(root / "experiments").glob("*.py")]):
        digest.update(f"{path.relative_to(root)} {sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(hardware: Hardware, link: str, device: str) -> dict[str, Any]:
    """The contents of `env.json`. `device` is cpu or cuda; torch is imported for cuda alone."""
    # A copy of the tree on a machine that gets only files is told its commit; a history that it lies in is another's.
    told = os.environ.get("HCMS_COMMIT")
    if told and not re.fullmatch(r"[0-9a-f]{7,40}", told):
        raise UsageError(f"HCMS_COMMIT={told[:40]}: give a commit's hash, 7 to 40 hexadecimal digits")
    status = None if told else _git("status", "--porcelain")
    variables = {**_variables_of(link), **os.environ} if device == "cuda" else os.environ
    facts: dict[str, Any] = {
        "commit": told or _git("rev-parse", "HEAD"),
        "commit_told": bool(told),
        # New figures and records do not change what was measured; new code does, and changes of any tracked file may.
        "dirty": None
        if status is None
        else any(
            not line.startswith("?? ") or line[3:].startswith(("src/", "experiments/", "conf/"))
            for line in status.splitlines()
        ),
        "code": code(),
        "hardware": asdict(hardware),
        "link": link,
        "python": sys.version.split()[0],
        "versions": _versions(),
        "variables": {name: variables[name] for name in VARIABLES if name in variables},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    facts["torch"] = facts["versions"].get("torch")
    facts["cuda"] = facts["driver"] = facts["nccl"] = None
    if device == "cuda":
        import torch

        facts["cuda"] = torch.version.cuda
        facts["nccl"] = ".".join(map(str, nccl_version(os.environ.get(NCCL) if is_one_card(link) else None)))
        facts["driver"] = _driver()
    return facts


def _variables_of(link: str) -> Mapping[str, str]:
    """What ranks over a link start with, beyond this process's own environment."""
    from hcms.links import links

    return links()[link].environment if link in links() else {}


def _driver() -> str | None:
    info = Path("/proc/driver/nvidia/version")
    if not info.exists():
        return None
    words = info.read_text().split()
    return next((w for w in words if w[0].isdigit() and w.count(".") >= 1), None)
