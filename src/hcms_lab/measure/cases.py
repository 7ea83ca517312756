"""What a run measures: points (one shape, one link, one kernel), each with cases that are timed against each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from hcms.hardware import visible_gpus
from hcms.methods import METHODS, shape_for
from hcms.schedule import profile
from hcms.schedule.cost import ITEMSIZE, Workload
from hcms.transport import COLLECTIVE
from hcms_lab.ground.checks import as_list, distinct, number, one_of, readable, whole
from hcms_lab.ground.config import BaseConfig, CasesConfig, Config, LayerConfig, RoundsConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.ground.layers import MOST_FRAMES, MOST_OF_A_SIZE, check_heads, check_tokens, check_workload
from hcms_lab.ground.names import KERNELS, PEER, PeerKind
from hcms_lab.measure.fits import check_memory, check_pace
from hcms_lab.measure.one_card import check_one_card
from hcms_lab.measure.peers import PEERS
from hcms_lab.measure.torchrun import ranks_here, started_ranks

if TYPE_CHECKING:
    from hcms.links import Link

DTYPES = tuple(ITEMSIZE)
MOST_ROUNDS = 10**6
MOST_RATIO = 0.95
MOST_ON_A_CARD = 8
EMULATED = "emulated"  # a link between processes of one host, all that a CPU has
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


def device_of(cfg: BaseConfig) -> str:
    if cfg.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device={cfg.device}: choose auto, cpu or cuda")
    if cfg.device == "auto":
        return "cuda" if visible_gpus() else "cpu"
    if cfg.device == "cuda" and not visible_gpus():
        raise UsageError("device=cuda: no GPU is visible here; leave it at auto, or give device=cpu")
    return cfg.device


def default_link(device: str) -> str:
    """What `link.kind=auto` is here."""
    several = visible_gpus() > 1 or (started_ranks() or 0) > 1
    return EMULATED if device == "cpu" else "native" if several else "ghost"


def link_of(cfg: Config) -> str:
    """The link's name: as configured, or by what is here: several GPUs' own, one GPU's ghost, emulated on CPU."""
    from hcms.links import links

    device, kind = device_of(cfg), cfg.link.kind
    if kind == "auto":
        return default_link(device)
    one_of("link.kind", kind, ("auto", *links()))
    if device not in links()[kind].devices:
        able = ", ".join(name for name, link in links().items() if device in link.devices)
        other = "; or give device=cpu" if device == "cuda" else ""
        raise UsageError(f"link.kind={kind}: it does not connect {device}; choose one of {able}{other}")
    if links()[kind].one_card:
        if started_ranks():
            raise UsageError(f"link.kind={kind}: torchrun starts no daemon for ranks that share a card; run without it")
        check_one_card()
    from hcms.links.native_host import P2P_DISABLE

    if kind == "native-host" and os.environ.get(P2P_DISABLE, None if started_ranks() else "1") != "1":
        raise UsageError(f"link.kind={kind}: it is made by {P2P_DISABLE}=1; set that before the ranks start")
    return kind


def one_for_all(cfg: Config) -> bool:
    """Whether one process stands for all ranks. Not over the emulated link, which needs no torch to say."""
    return link_of(cfg) != EMULATED and _link(cfg).one_for_all


def one_card(cfg: Config) -> bool:
    """Whether all ranks share one card."""
    return link_of(cfg) != EMULATED and _link(cfg).one_card


def _link(cfg: Config) -> Link:
    from hcms.links import links

    return links()[link_of(cfg)]


def latency_us_of(cfg: Config) -> float:
    """What is added to each work: as configured, or 50 µs on an emulated link, nothing on one that is there."""
    if cfg.link.latency_us is not None:
        return cfg.link.latency_us
    return 50.0 if link_of(cfg) == EMULATED else 0.0


def ranks_of(cfg: Config) -> list[int]:
    """The rank counts: as configured, or what torchrun started, every visible GPU, 4 where one process stands for all,
    2 on a CPU."""
    device, started = device_of(cfg), started_ranks()
    alone, shared = one_for_all(cfg), one_card(cfg)
    most = MOST_OF_A_SIZE if device == "cpu" or alone else MOST_ON_A_CARD if shared else visible_gpus()
    if started and most < MOST_OF_A_SIZE:
        if ranks_here() > most:
            raise UsageError(f"torchrun started {ranks_here()} ranks on a host where {most} GPUs are visible")
        most = started  # on all hosts together
    if cfg.ranks == EACH:
        fitting = [p for p in (2, 4, 8) if p <= most]
        if not fitting:
            raise UsageError(f"ranks={EACH}: it takes 2 GPUs or more, {most} is visible; give device=cpu")
        return fitting
    own = 4 if alone else 2 if device == "cpu" or shared else most
    for ranks in (wanted := as_list(cfg.ranks) or [started or own]):
        whole("ranks", ranks, 2 if alone else 1, high=MOST_OF_A_SIZE)
        if shared and ranks > most:
            raise UsageError(f"ranks={ranks}: {most} ranks at most share a card; give fewer")
        if ranks > most:
            raise UsageError(f"ranks={ranks}: only {most} GPUs are visible; give at most that many")
    return wanted


def cases_of(
    methods: list[str],
    cuts: list[str],
    heads_a_rank: int,
    ranks: int,
    prefetch: int | None = None,
    first: str = "exchange",
) -> tuple[Case, ...]:
    """The cases of these methods, each with its own cut or with every one of `cuts`."""
    distinct("methods", methods, f"nothing to measure; name at least one of {', '.join(METHODS)}")
    if cuts:
        distinct("cuts", cuts)
    one_of("first", first, ("exchange", "return"))
    if prefetch is not None:
        whole("prefetch", prefetch)
    cases: dict[Case, None] = {}
    for entry in methods:
        method, at, own_cut = entry.partition("@")
        if at and not own_cut:
            raise UsageError(f"methods={entry}: no cut follows the @; give methods=[{method}@even:2], say")
        one_of("methods", method, (*METHODS, *(PEER + name for name in PEERS if method.startswith(PEER))))
        if method in METHODS and METHODS[method].cuts:
            if not own_cut and not cuts:
                raise UsageError(f"cuts=[]: {method} cuts heads; give cuts=[even:2], say, or methods=[{method}@even:2]")
            for cut in [own_cut] if own_cut else cuts:
                if cut != "auto":
                    try:
                        cut = str(shape_for(METHODS[method], cut, heads_a_rank))
                    except ValueError as error:
                        raise UsageError(f"cuts={cut} with ranks={ranks}: {error}") from None
                cases[Case(method, str(cut), prefetch, first)] = None
        elif own_cut:
            raise UsageError(f"methods={entry}: {method} cuts no heads, so it takes no cut; give methods=[{method}]")
        else:
            cases[Case(method, None)] = None
    return tuple(cases)


def check_ranks(ranks: Any) -> None:
    """Refuse an empty list of ranks, or one that names a count twice; `ranks_of` looks at each."""
    if ranks is not None:
        distinct("ranks", as_list(ranks), f"give a number of ranks, a list, or {EACH}")


def check_run(cfg: Config) -> None:
    """Refuse rounds, links, kernels and profiles that no experiment on ranks could use.

    Raises:
        UsageError: one line on the first such setting.
    """
    check_rounds(cfg.bench)
    one_of("bench.load", cfg.bench.load, ("auto", "sustained", "rested"))
    one_of("bench.graph", cfg.bench.graph, ("auto", "off"))
    number("bench.block_ms", cfg.bench.block_ms, 1, 60_000)
    number("bench.rest_ms", cfg.bench.rest_ms, 0, 60_000)
    whole("bench.seed", cfg.bench.seed, 0)
    number("bench.timeout_s", cfg.bench.timeout_s, 1, 86_400)
    check_ranks(cfg.ranks)
    if cfg.link.gbps is not None:
        otherwise = ", or null to derive it from link.ratio"
        number("link.gbps", cfg.link.gbps, 0, 1e6, above=True, otherwise=otherwise)
    if cfg.link.latency_us is not None:
        number("link.latency_us", cfg.link.latency_us, 0, 1e6)
    if cfg.link.kind == "ghost-sm" and (cfg.link.gbps is not None or cfg.link.latency_us):
        raise UsageError("link.kind=ghost-sm: it is as fast as it is; leave out link.gbps and link.latency_us")
    if not isinstance(cfg.link.ratio_at, str):
        whole("link.ratio_at", cfg.link.ratio_at, high=MOST_FRAMES)
    elif cfg.link.ratio_at not in ("longest", "each"):
        raise UsageError(f"link.ratio_at={cfg.link.ratio_at}: choose longest, each, or a number of latent frames")
    ratios = as_list(cfg.link.ratio)
    distinct("link.ratio", ratios, "give at least one ratio, or link.gbps")
    for ratio in ratios:
        # A link so slow that attention is a twentieth of the time shows nothing, and takes hours to show it.
        if ratio != LOWEST:
            number("link.ratio", ratio, 0, MOST_RATIO, above=True, otherwise=f", or {LOWEST!r}")
    check_transport(cfg)
    distinct("kernels", cfg.kernels)
    for kernel in cfg.kernels:
        one_of("kernels", kernel, KERNELS)
    if cfg.profile is not None:
        advice = "+exp=calibrate writes one, and null measures anew"
        readable("profile", cfg.profile, advice, at_most_mib=4.0)
        try:
            profile.load(cfg.profile)
        except ValueError as error:
            why = str(error).removeprefix(f"{cfg.profile}: ")
            raise UsageError(f"profile={cfg.profile}: {why}") from None


def check_transport(cfg: Config) -> None:
    """Refuse a transport that is none, or that cannot carry what these ranks hold."""
    if cfg.transport == COLLECTIVE:  # carries everything, and the others cannot be named without torch
        return
    from hcms.transport import transports

    one_of("transport", cfg.transport, transports())
    chosen, device, link = transports()[cfg.transport], device_of(cfg), link_of(cfg)
    if device not in chosen.devices:
        raise UsageError(f"transport={cfg.transport}: it carries no tensors on {device}; leave it at collective")
    if not chosen.collectives and link == "native-host":
        raise UsageError(f"transport={cfg.transport}: it goes past NCCL, not through the host; give link.kind=native")
    if not chosen.collectives and one_for_all(cfg):
        raise UsageError(f"transport={cfg.transport}: over link.kind={link} there are no peers to write to")


def check_rounds(bench: RoundsConfig) -> None:
    whole("bench.iterations", bench.iterations, high=MOST_ROUNDS)
    if bench.warmup < 1:
        raise UsageError(f"bench.warmup={bench.warmup}: give at least 1, since a first call makes buffers")
    whole("bench.warmup", bench.warmup, high=MOST_ROUNDS)


def ratios_of(cfg: Config) -> list[float | None]:
    """The communication ratios that a checked configuration's link is to be derived from; None derives nothing."""
    if link_of(cfg) != EMULATED or cfg.link.gbps is not None:
        return [None]
    return [None if ratio == LOWEST else ratio for ratio in as_list(cfg.link.ratio)]


def points(cfg: LayerConfig) -> list[Point]:
    """The grid of a configuration: ranks x link ratios x kernels x dtypes x lengths, checked.

    Points have cases where the configuration has methods.

    Raises:
        UsageError: anything that could not run, before any rank starts.
    """
    w = cfg.workload
    check_workload(w)
    check_run(cfg)
    dtypes, frames = as_list(w.dtype), as_list(cfg.latent_frames)
    distinct("workload.dtype", dtypes)
    for dtype in dtypes:
        one_of("workload.dtype", dtype, DTYPES)
    distinct("latent_frames", frames)
    for f in frames:
        whole("latent_frames", f, high=MOST_FRAMES)
    ratios, device = ratios_of(cfg), device_of(cfg)
    grid: list[Point] = []
    for ranks in ranks_of(cfg):
        check_heads(w.heads, ranks)
        if ranks == 1 and any(ratio is not None for ratio in ratios):
            raise UsageError(
                f"ranks=1: one rank exchanges nothing, so no bandwidth gives link.ratio={cfg.link.ratio}; "
                "give more ranks, or link.gbps"
            )
        for f in frames:
            check_tokens("latent_frames", f, w.tokens_per_frame, ranks)
        if isinstance(cfg.link.ratio_at, int) and ratios != [None]:
            check_tokens("link.ratio_at", cfg.link.ratio_at, w.tokens_per_frame, ranks)
        cases: tuple[Case, ...] = ()
        if isinstance(cfg, CasesConfig):
            cases = cases_of(cfg.methods, cfg.cuts, w.heads // ranks, ranks, cfg.prefetch, cfg.first)
        for ratio, kernel, dtype in product(ratios, cfg.kernels, dtypes):
            for f in sorted(frames, reverse=True):  # the longest first: it sets the link
                tokens = f * w.tokens_per_frame
                grid.append(Point(w.name, ranks, f, tokens, w.heads, w.head_dim, w.batch, dtype, kernel, ratio, cases))
    if device == "cpu" and (kept := next((c.cut for p in grid for c in p.cases if "+sms" in str(c.cut)), None)):
        raise UsageError(f"cuts={kept}: a CPU has no SMs to keep for communication; leave +sms out")
    shared = one_card(cfg)
    for p in grid:
        layer = Workload(p.seq_len, p.heads, p.ranks, p.head_dim, p.batch, p.dtype)
        check_memory(layer, f"latent_frames={p.frames}", device, ranks_a_card=p.ranks if shared else 1)
        if link_of(cfg) == EMULATED:
            check_pace(layer, cfg.link.gbps, latency_us_of(cfg))
    return grid
