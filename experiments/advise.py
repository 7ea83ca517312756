"""Advice without hardware: `python experiments/run.py +exp=advise gpu=l40s ranks=4 latent_frames=13`, or `gpu=all`.

Prints and writes nothing else: the verdict, the numbers behind it, and with `assumptions=true` what nobody published.
The predictions and the verdict's rule are `hcms.schedule.advice`'s; from 16 ranks on they cross two link levels, NVLink
or PCIe inside a node and a network between nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hcms.schedule import catalogue
from hcms.schedule.advice import DO_NOT, LITTLE, USE, Advice, advise, verdict
from hcms.schedule.cost import Workload
from hcms.schedule.cut import format_cut
from hcms_lab.ground.checks import as_list, distinct
from hcms_lab.ground.config import BaseConfig, WorkloadConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.layers import check_priced, gpus_of
from hcms_lab.report.terminal import Column, print_whole, table, width
from hcms_lab.report.words import short_cut

WRITES = False
LEGEND = (
    "Times are of one attention layer. rho is the share of communication in Ulysses: wire alone, and with copies "
    "and latency. Ulysses is the faster of three exchanges and one packed exchange; the gain is HCMS's over it, with "
    "attention and link 10 % off either way or in the catalogue's ranges (low to high). Use it: rho >= 20 % and a low "
    "end of 1 % at least, or rho >= 10 % and 5 % at least. Do not: a high end below 1 %. Otherwise little."
)
STYLES = {USE: "green", LITTLE: "yellow", DO_NOT: "red"}


@dataclass
class Settings(BaseConfig):
    kind: str = "advise"
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    gpu: str | None = "all"  # a GPU of the catalogue, or all
    ranks: Any = 4  # an int or a list
    latent_frames: Any = 9  # an int or a list
    kernels: list[str] = field(default_factory=list)  # [] is each GPU's fastest of known rate
    assumptions: bool = False  # list what nobody published


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
    """Print the verdict and a table for each number of ranks and frames, then the rule, and what was assumed."""
    del folder
    limit = width()
    console = Console(width=limit, highlight=False)
    notes: dict[str, int] = {}
    for ranks in as_list(cfg.ranks):
        for frames in as_list(cfg.latent_frames):
            gpus = gpus_of(cfg.gpu)
            advices = _advices(cfg, gpus, ranks, frames)
            for line in [*_best(advices), *_verdicts(advices), *_held(advices), *_variants(cfg, gpus, ranks, frames)]:
                console.print(line)
            print_whole(_table(cfg, advices, ranks, frames, notes, limit), limit)
    console.print(LEGEND, style="dim")
    if cfg.assumptions:
        console.print("\nAssumed, as nothing published was found:")
        for text, number in notes.items():
            console.print(f" {number:2}  {text}")
    elif notes:
        console.print(f"{len(notes)} inputs are assumed, as nothing published was found: assumptions=true lists them.")
    return True


def _best(advices: list[Advice]) -> list[str]:
    """A line with for whom the paper's two lanes are not the way, and `hcms-zero` with SMs kept is."""
    each = [
        f"{a.gpu.name} over {a.link} {a.kept_gain:+.0%} (+sms{a.kept_sms})"
        for a in advices
        if a.verdict != USE and a.kept_gain is not None and a.kept_low is not None
        if verdict(a.comm_ratio, a.kept_low, a.kept_gain) == USE
    ]
    return [f"[{STYLES[USE]}]use hcms-zero[/], SMs kept for NCCL: {', '.join(each)}"] if each else []


def _verdicts(advices: list[Advice]) -> list[str]:
    """A line a verdict, the best first, with whom it is for; of the paper's two lanes."""
    by_verdict = sorted(advices, key=lambda advice: list(STYLES).index(advice.verdict))
    several = len({(a.gpu.slug, a.link) for a in advices}) < len(advices)  # kernels
    lines = []
    by_hcms = " by hcms" if _best(advices) else ""
    for said, some in groupby(by_verdict, key=lambda advice: advice.verdict):
        each = [
            f"{a.gpu.name} over {a.link}{f' with {a.kernel}' if several else ''} {a.gain:+.0%}"
            for a in sorted(some, key=lambda a: -a.gain)
        ]
        lines.append(f"[{STYLES[said]}]{said}[/]{by_hcms}: {', '.join(each)}")
    return lines


def _held(advices: list[Advice]) -> list[str]:
    """For whom attention's kernel leaves NCCL no SM, and what would help there: a line for each such kernel."""
    held = [(a, a.freed_gain) for a in advices if a.freed_gain is not None]
    lines = []
    for kernel in dict.fromkeys(a.kernel for a, _ in held):
        freed = [f"{a.gpu.name} over {a.link} {gain:+.0%}" for a, gain in held if a.kernel == kernel]
        kept = [
            f"{a.gpu.name} over {a.link} {a.kept_gain:+.0%} (+sms{a.kept_sms})"
            for a, _ in held
            if a.kernel == kernel and a.kept_gain is not None
        ]
        lines.append(
            f"{kernel} holds every SM until it ends, and NCCL's exchanges wait for it: one overlaps only where it "
            "happens to begin first, as the gains of hcms assume. hcms-zero would give: with SMs kept for NCCL "
            f"{', '.join(kept) or 'not known'}; with exchanges that need no SM (transport=copy-engine, one host) "
            f"{', '.join(freed)} (as predicted)."
        )
    return lines


def _variants(cfg: Settings, gpus: list[catalogue.Gpu], ranks: int, frames: int) -> list[str]:
    """Which card a name was taken for, and what its sisters of another socket would be told."""
    if cfg.gpu == "all":
        return []
    (gpu,) = gpus
    lines = [f"{cfg.gpu} is taken for {gpu.name} ({gpu.slug})."] if cfg.gpu != gpu.slug else []
    for sister in catalogue.load().gpus.values():
        if sister is not gpu and _chip(sister) == _chip(gpu):
            each = "; ".join(f"{a.verdict} over {a.link}" for a in _advices(cfg, [sister], ranks, frames))
            lines.append(f"{sister.name} is another card, gpu={sister.slug}: {each or 'no link for so many ranks'}.")
    return lines


def _chip(gpu: catalogue.Gpu) -> str:
    """`h100` of h100-sxm and h100-pcie."""
    return gpu.slug.removesuffix("-sxm").removesuffix("-pcie")


def _advices(cfg: Settings, gpus: list[catalogue.Gpu], ranks: int, frames: int) -> list[Advice]:
    w = cfg.workload
    workload = Workload(frames * w.tokens_per_frame, w.heads, ranks, w.head_dim, w.batch, str(w.dtype))
    return [
        advise(gpu, workload, kernel=kernel, link=link.name)
        for gpu in gpus
        for kernel in cfg.kernels or [gpu.kernel]
        if kernel in gpu.known_kernels
        for link in gpu.links.values()
        if link.ranks > 2 or ranks == 2
    ]


def _table(cfg: Settings, advices: list[Advice], ranks: int, frames: int, notes: dict[str, int], limit: int) -> Table:
    """One row for each GPU and link; new assumptions are numbered into `notes`."""
    w = cfg.workload
    numbers = [[notes.setdefault(text, len(notes) + 1) for text in advice.assumed] for advice in advices]
    columns = [
        Column("GPU", [a.gpu.slug for a in advices]),
        Column("link", [a.link for a in advices]),
        Column("verdict", [f"[{STYLES[a.verdict]}]{a.verdict}[/]" for a in advices]),
        Column("gain", [f"{a.gain:+.1%}" for a in advices], right=True),
        Column("low to high", [f"{a.gain_low:+.0%} to {a.gain_high:+.0%}" for a in advices], right=True),
        Column("rho", [f"{a.comm_ratio:.0%}" for a in advices], right=True),
        Column("wire", [f"{a.wire_ratio:.0%}" for a in advices], right=True, rank=1),
        Column("best cut", [_cut(a) for a in advices]),
        Column("HCMS\nms", [f"{a.hcms_ms:.1f}" for a in advices], right=True, rank=5),
        Column("Ulysses\nms", [_ms(a.ulysses_ms, a.ulysses_packed_ms) for a in advices], right=True, rank=3),
        Column("Ring\nms", [f"{a.ring_ms:.1f}" for a in advices], right=True, rank=2),
        Column("fastest", [a.fastest for a in advices], rank=6),
        Column("kernel", [a.kernel for a in advices], rank=4 if len({a.kernel for a in advices}) == 1 else 7),
    ]
    if cfg.assumptions:
        columns.append(Column("assumed", [_ranges(n) for n in numbers], wraps=True))
    tokens = frames * w.tokens_per_frame
    title = (
        f"Predicted: {w.name}, {ranks} ranks, {frames} frames = {tokens:,} tokens, {w.heads} heads of {w.head_dim}, "
        f"{w.dtype}"
    )
    return table(title, columns, limit, box=SIMPLE_HEAD, padding=0)


def _cut(advice: Advice) -> str:
    return short_cut(format_cut(advice.choice.cut)) if len(advice.choice.cut) > 1 else "uncut"


def _ms(*times_ms: float) -> str:
    return f"{min(times_ms):.1f}"


def _ranges(numbers: list[int]) -> str:
    """`[1, 2, 3, 5]` as `1-3,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
