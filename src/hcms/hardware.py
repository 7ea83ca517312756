"""What this machine is, for records: name, slug, count; and how many GPUs are visible, without importing torch."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hardware:
    """The kind of device that computes: `count` GPUs, or one CPU of `cores` cores."""

    name: str
    slug: str
    count: int
    cores: int


def visible_gpus() -> int:
    """GPUs that CUDA would show, read from the driver's device files and CUDA_VISIBLE_DEVICES."""
    there = len(list(Path("/dev").glob("nvidia[0-9]*")))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return there
    return min(there, len([c for c in chosen.split(",") if c.strip() not in ("", "-1")]))


def this_host() -> str:
    """What tells hosts apart that may bear one name; containers of one host share its clock, and this."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def slugify(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(device: str) -> Hardware:
    """This machine's `cuda` or `cpu` hardware."""
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name(0)
        return Hardware(name, slugify(name), torch.cuda.device_count(), cores())
    name = "CPU"
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = re.sub(r"\((R|TM|tm|r)\)", "", match[1]).strip()
    return Hardware(f"{name}, {cores()} cores", slugify(f"cpu-{name}-{cores()}c"), 1, cores())
