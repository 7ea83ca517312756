"""What a run measures: points (one shape, one link, one kernel), each with cases that are timed against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

from hcms.hardware import visible_gpus
from hcms.methods import METHODS
from hcms.schedule.cut import format_cut, parse_cut
from hcms_lab.ground.config import Config
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.names import KERNELS, PEER, PeerKind
from hcms_lab.measure.peers import PEERS

DTYPES = ("float32", "bfloat16", "float16")
LOWEST = "lowest"  # a link.ratio: no pacing, so the ratio that the machine's own exchange has
EACH = "each"  # of ranks: 2, 4 and 8, as far as there are GPUs for them; CPU ranks may share cores


@dataclass(frozen=True)
class Case:
    """One contestant at a point. `cut` is a plan as `parse_cut` reads it, `"auto"`, or None where nothing is cut."""

    method: str
    cut: str | None
    prefetch: int | None = None
    first: str = "exchange"

    @property
    def peer_kind(self) -> PeerKind | None:
        """What a peer says that it is; None of a method of ours."""
        return PEERS[self.method.removeprefix(PEER)].kind if self.method.startswith(PEER) else None


@dataclass(frozen=True)
class Point:
    """One layer on one link: its cases are interleaved in one process group."""

    workload: str
    ranks: int
    frames: int | None
    seq_len: int
    heads: int
    head_dim: int
    batch: int
    dtype: str
    kernel: str
    link_ratio: float | None
    cases: tuple[Case, ...]

    @property
    def heads_a_rank(self) -> int:
        return self.heads // self.ranks

    @property
    def title(self) -> str:
        ratio = "" if self.link_ratio is None else f", rho {self.link_ratio:g}"
        return f"{self.ranks} ranks, {self.seq_len:,} tokens{ratio}, {self.kernel}"


def as_list(value: Any) -> list[Any]:
    """A config value that may be one thing or a list of it."""
    if value is None:
        return []
    return list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else [value]


def device_of(cfg: Config) -> str:
    if cfg.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device={cfg.device}: choose auto, cpu or cuda")
    if cfg.device == "auto":
        return "cuda" if visible_gpus() else "cpu"
    if cfg.device == "cuda" and not visible_gpus():
        raise UsageError("device=cuda: no GPU is visible here; leave it at auto, or give device=cpu")
    return cfg.device


def link_of(cfg: Config) -> str:
    if cfg.link.kind not in ("auto", "emulated", "native"):
        raise UsageError(f"link.kind={cfg.link.kind}: choose auto, emulated or native")
    device = device_of(cfg)
    if cfg.link.kind == "auto":
        return "native" if device == "cuda" else "emulated"
    if cfg.link.kind == "emulated" and device == "cuda":
        raise UsageError("link.kind=emulated: GPUs use their real link; give link.kind=native, or device=cpu")
    return cfg.link.kind


def ranks_of(cfg: Config) -> list[int]:
    device = device_of(cfg)
    if cfg.ranks == EACH:
        fitting = [p for p in (2, 4, 8) if device == "cpu" or p <= visible_gpus()]
        if not fitting:
            raise UsageError(f"ranks={EACH}: it takes 2 GPUs or more, {visible_gpus()} is visible; give device=cpu")
        return fitting
    wanted = as_list(cfg.ranks) or [max(visible_gpus(), 1) if device == "cuda" else 2]
    for ranks in wanted:
        _positive("ranks", ranks)
        if device == "cuda" and ranks > visible_gpus():
            raise UsageError(f"ranks={ranks}: only {visible_gpus()} GPUs are visible; give at most that many")
    return wanted


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name}={value}: give a whole number of at least 1")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{name}={value}: choose one of {', '.join(known)}")


def _cases(cfg: Config, heads_a_rank: int, ranks: int) -> tuple[Case, ...]:
    cases: dict[Case, None] = {}
    for entry in cfg.methods:
        method, _, own_cut = entry.partition("@")
        _one_of("methods", method, (*METHODS, *(PEER + name for name in PEERS if method.startswith(PEER))))
        if method in METHODS and METHODS[method].cuts:
            if not own_cut and not cfg.cuts:
                raise UsageError(f"cuts=[]: {method} cuts heads; give cuts=[even:2], say, or methods=[{method}@even:2]")
            for cut in [own_cut] if own_cut else cfg.cuts:
                if cut != "auto":
                    try:
                        cut = format_cut(parse_cut(cut, heads_a_rank))
                    except ValueError as error:
                        raise UsageError(f"cuts={cut} with ranks={ranks}: {error}") from None
                cases[Case(method, str(cut), cfg.prefetch, cfg.first)] = None
        elif own_cut:
            raise UsageError(f"methods={entry}: {method} cuts no heads, so it takes no cut; give methods=[{method}]")
        else:
            cases[Case(method, None)] = None
    if not cases:
        raise UsageError(f"methods=[]: nothing to measure; name at least one of {', '.join(METHODS)}")
    return tuple(cases)


def points(cfg: Config) -> list[Point]:
    """The grid of a configuration: ranks x link ratios x kernels x dtypes x frames, checked.

    Raises:
        UsageError: anything that could not run, before any rank starts.
    """
    w = cfg.workload
    for name, value in (("tokens_per_frame", w.tokens_per_frame), ("heads", w.heads), ("head_dim", w.head_dim)):
        _positive(f"workload.{name}", value)
    _positive("workload.batch", w.batch)
    dtypes = as_list(w.dtype)
    for dtype in dtypes:
        _one_of("workload.dtype", dtype, DTYPES)
    _one_of("first", cfg.first, ("exchange", "return"))
    _positive("bench.iterations", cfg.bench.iterations)
    if cfg.bench.warmup < 1:
        raise UsageError(f"bench.warmup={cfg.bench.warmup}: give at least 1, since a first call makes buffers")
    if cfg.prefetch is not None:
        _positive("prefetch", cfg.prefetch)
    if cfg.link.gbps is not None and not 0 < cfg.link.gbps < math.inf:
        raise UsageError(
            f"link.gbps={cfg.link.gbps}: give a bandwidth above 0 GB/s, or null to derive it from link.ratio"
        )
    if not 0 <= cfg.link.latency_us < math.inf:
        raise UsageError(f"link.latency_us={cfg.link.latency_us}: give 0 or more microseconds")
    ratios: list[float | None] = [None]
    if link_of(cfg) == "emulated" and cfg.link.gbps is None:
        ratios = [None if ratio == LOWEST else ratio for ratio in as_list(cfg.link.ratio)]
        for ratio in ratios:
            if ratio is not None and (not isinstance(ratio, int | float) or not 0 < ratio < 1):
                raise UsageError(f"link.ratio={ratio}: give a ratio between 0 and 1, both excluded, or {LOWEST!r}")
        if not ratios:
            raise UsageError("link.ratio=[]: give at least one ratio, or link.gbps")
    frames = as_list(cfg.frames)
    for f in frames:
        _positive("frames", f)
    if cfg.link.ratio_at not in ("longest", "each"):
        if not isinstance(cfg.link.ratio_at, int):
            raise UsageError(f"link.ratio_at={cfg.link.ratio_at}: choose longest, each, or a number of frames")
        _positive("link.ratio_at", cfg.link.ratio_at)
    for name, chosen in (("frames", frames), ("kernels", cfg.kernels), ("workload.dtype", dtypes)):
        if not chosen:
            raise UsageError(f"{name}=[]: nothing to measure; give at least one")
    for kernel in cfg.kernels:
        _one_of("kernels", kernel, KERNELS)
    grid: list[Point] = []
    for ranks in ranks_of(cfg):
        if w.heads % ranks:
            fitting = [p for p in range(1, w.heads + 1) if w.heads % p == 0]
            raise UsageError(
                f"ranks={ranks}: {w.heads} heads cannot be divided among {ranks} ranks; give one of {fitting}"
            )
        if ranks == 1 and any(ratio is not None for ratio in ratios):
            raise UsageError(
                f"ranks=1: one rank exchanges nothing, so no bandwidth gives link.ratio={cfg.link.ratio}; "
                "give more ranks, or link.gbps"
            )
        cases = _cases(cfg, w.heads // ranks, ranks)
        for ratio in ratios:
            for kernel, dtype in product(cfg.kernels, dtypes):
                for f in sorted(frames, reverse=True):  # the longest first: it sets the link
                    seq_len = f * w.tokens_per_frame
                    if seq_len % ranks:
                        raise UsageError(
                            f"frames={f}: {seq_len} tokens cannot be divided among {ranks} ranks; "
                            f"{seq_len - seq_len % ranks} or {seq_len - seq_len % ranks + ranks} tokens could"
                        )
                    grid.append(
                        Point(w.name, ranks, f, seq_len, w.heads, w.head_dim, w.batch, dtype, kernel, ratio, cases)
                    )
    return grid
