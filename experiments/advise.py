"""Advice without hardware: `python experiments/run.py +exp=advise gpu=l40s ranks=4 latent_frames=13`, or `gpu=all`.

Prints and writes nothing else. The predictions and the verdict's rule are `hcms.schedule.advice`'s; from 16 ranks on
they cross two link levels, NVLink or PCIe inside a node and a network between nodes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hcms.schedule.advice import LITTLE, USE, Advice, advise
from hcms.schedule.cost import Workload
from hcms.schedule.cut import format_cut
from hcms_lab.ground.checks import as_list, distinct
from hcms_lab.ground.config import BaseConfig, WorkloadConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.layers import check_priced, gpus_of

WRITES = False
WIDTH = 144  # where the output is no terminal
LEGEND = (
    "Times are of one attention layer. rho is the share of communication in Ulysses: wire alone, and with copies "
    "and latency. Ulysses is the faster of three exchanges and one packed exchange; the gain is HCMS's over it, with "
    "attention and link 10 % off either way or in the ranges below. Use it: rho >= 20 % and a gain of 1 % at least, or "
    "rho >= 10 % and 5 % at least. Do not: a gain below 1 % at most. Otherwise there is little to gain."
)
STYLES = {USE: "green", LITTLE: "yellow"}


@dataclass
class Settings(BaseConfig):
    kind: str = "advise"
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    gpu: str | None = "all"  # a GPU of the catalogue, or all
    ranks: Any = 4  # an int or a list
    latent_frames: Any = 9  # an int or a list
    kernels: list[str] = field(default_factory=list)  # [] is each GPU's fastest of known rate


def validate(cfg: Settings) -> None:
    """Refuse what the catalogue or the model cannot answer.

    Raises:
        UsageError: unknown GPU or kernel, ranks that do not divide the heads or the tokens, another dtype or head size.
    """
    check_priced(cfg.workload, cfg.ranks, cfg.latent_frames)
    if cfg.kernels:
        distinct("kernels", cfg.kernels)
    gpus = gpus_of(cfg.gpu)
    for kernel in cfg.kernels:
        if not any(kernel in gpu.known_kernels for gpu in gpus):
            known = dict.fromkeys(k for gpu in gpus for k in gpu.known_kernels)
            raise UsageError(
                f"kernels={kernel}: no rate is known for it on gpu={cfg.gpu}; choose of {', '.join(known)}"
            )


def run(cfg: Settings, folder: Path | None) -> bool:
    """Print a table for each number of ranks and frames, then the rule and what was assumed."""
    del folder
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    notes: dict[str, int] = {}
    for ranks in as_list(cfg.ranks):
        for frames in as_list(cfg.latent_frames):
            console.print(_table(cfg, ranks, frames, notes))
    console.print(LEGEND, style="dim")
    if notes:
        console.print("\nAssumed, as nothing published was found:")
        for text, number in notes.items():
            console.print(f" {number:2}  {text}")
    return True


def _advices(cfg: Settings, ranks: int, frames: int) -> list[Advice]:
    w = cfg.workload
    workload = Workload(frames * w.tokens_per_frame, w.heads, ranks, w.head_dim, w.batch, str(w.dtype))
    return [
        advise(gpu, workload, kernel=kernel, link=link.name)
        for gpu in gpus_of(cfg.gpu)
        for kernel in cfg.kernels or [gpu.kernel]
        if kernel in gpu.known_kernels
        for link in gpu.links.values()
        if link.ranks > 2 or ranks == 2
    ]


def _table(cfg: Settings, ranks: int, frames: int, notes: dict[str, int]) -> Table:
    """One row for each GPU and link; new assumptions are numbered into `notes`."""
    w = cfg.workload
    tokens = frames * w.tokens_per_frame
    table = Table(
        title=f"Predicted: {w.name}, {ranks} ranks, {frames} frames = {tokens:,} tokens, "
        f"{w.heads} heads of {w.head_dim}, {w.dtype}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("GPU", "link", "kernel"):
        table.add_column(column, no_wrap=True)
    for column in ("rho\nwire", "rho", "Ulysses\nms", "Ring\nms", "HCMS\nms", "gain", "low to high"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("best cut", "verdict", "assumed"):
        table.add_column(column, no_wrap=column == "verdict")
    for advice in _advices(cfg, ranks, frames):
        numbers = [notes.setdefault(text, len(notes) + 1) for text in advice.assumed]
        verdict = f"[{STYLES.get(advice.verdict, 'red')}]{advice.verdict}[/]"
        if advice.fastest == "ring" and advice.ring_ms < 0.99 * advice.hcms_ms:
            verdict += " (Ring faster)"
        table.add_row(
            advice.gpu.slug,
            advice.link,
            advice.kernel,
            f"{advice.wire_ratio:.0%}",
            f"{advice.comm_ratio:.0%}",
            f"{min(advice.ulysses_ms, advice.ulysses_packed_ms):.1f}",
            f"{advice.ring_ms:.1f}",
            f"{advice.hcms_ms:.1f}",
            f"{advice.gain:+.1%}",
            f"{advice.gain_low:+.0%} to {advice.gain_high:+.0%}",
            format_cut(advice.choice.cut) if len(advice.choice.cut) > 1 else "uncut",
            verdict,
            _ranges(numbers),
        )
    return table


def _ranges(numbers: list[int]) -> str:
    """`[1, 2, 3, 5]` as `1-3,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
