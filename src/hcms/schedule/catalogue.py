"""The catalogue of GPUs, links and networks in `catalogue.yaml`; an entry becomes a `Profile` like a measured one.

Attention takes full waves of 128-query tiles over the GPU's SMs: `ceil(heads · ceil(S / 128) / SMs)` of them, each at
the published rate, so that small chunks that fill their last wave badly are less efficient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hcms.schedule.profile import AttendPoint, Level, Profile

PATH = Path(__file__).with_name("catalogue.yaml")
DTYPES = ("bfloat16", "float16")
HEAD_DIM = 128
_RATED_AT = (32_768, 40)  # tokens and heads at which published attention rates are taken to hold
SPREAD = 0.1  # of attention and link, where the catalogue gives no range


@dataclass(frozen=True, slots=True)
class Number:
    """A value with where it comes from.

    Args:
        value: None where nothing is known.
        tag: D, R, C, 2 or K, as the head of catalogue.yaml explains.
        source: key into the catalogue's sources.
        reason: why it is assumed to be so; None for what was published.
        low, high: what it may lie in.
        also: what else was found.
    """

    value: float | None
    tag: str | None = None
    source: str | None = None
    reason: str | None = None
    low: float | None = None
    high: float | None = None
    also: str | None = None

    @classmethod
    def read(cls, where: str, entry: Any) -> Number:
        """Parse `{value, tag, source, assumed, reason, range, also}`.

        Raises:
            ValueError: no source of any kind, or something else is missing; the message names the place.
        """
        if not isinstance(entry, dict) or "value" not in entry:
            raise ValueError(f"{PATH.name}: {where} is {entry!r}, wanted a mapping with a value")
        if unknown := set(entry) - {"value", "tag", "source", "assumed", "reason", "range", "also"}:
            raise ValueError(f"{PATH.name}: {where} has unknown keys {sorted(unknown)}")
        value = None if entry["value"] == "unknown" else float(entry["value"])
        reason = entry.get("reason")
        if bool(entry.get("assumed")) != (reason is not None):
            raise ValueError(f"{PATH.name}: {where}: what is assumed needs a reason, and only that")
        if (
            value is not None
            and reason is None
            and entry.get("tag") != "K"
            and not (entry.get("tag") and entry.get("source"))
        ):
            raise ValueError(f"{PATH.name}: {where} has neither a tag with a source nor a reason")
        low, high = entry.get("range", (None, None))
        return cls(value, entry.get("tag"), entry.get("source"), reason, low, high, entry.get("also"))

    def spread(self, share: float) -> tuple[float, float]:
        """The range, or the value less and more `share` of it."""
        assert self.value is not None
        low = self.value * (1 - share) if self.low is None else self.low
        return low, self.value * (1 + share) if self.high is None else self.high


@dataclass(frozen=True, slots=True)
class Link:
    """What connects the GPUs of a node: `ranks` at most. `rotate_gbps` to one neighbour, where it is known."""

    name: str
    kind: str
    ranks: int
    nominal_gbps: Number
    alltoall_gbps: Number
    rotate_gbps: Number | None
    latency_ms: Number
    per_peer_ms: Number
    attention_slowdown: Number


@dataclass(frozen=True, slots=True)
class Network:
    """What connects nodes, by the GPU."""

    name: str
    title: str
    nominal_gbps: Number
    efficiency: Number
    latency_ms: Number
    per_peer_ms: Number


@dataclass(frozen=True)
class Gpu:
    """One GPU type. `numbers` are its data sheet's, `attention_tflops` by kernel, `links` with the default first."""

    slug: str
    name: str
    numbers: dict[str, Number]
    kernel: str
    attention_tflops: dict[str, Number]
    links: dict[str, Link]
    network: str

    @property
    def known_kernels(self) -> tuple[str, ...]:
        """Kernels whose rate is known or assumed."""
        return tuple(name for name, number in self.attention_tflops.items() if number.value is not None)

    def profile(
        self,
        *,
        kernel: str | None = None,
        link: str | None = None,
        network: str | None = None,
        attention_tflops: float | None = None,
        alltoall_gbps: float | None = None,
        attention_slowdown: float | None = None,
        wire_needs_sms: bool = True,
    ) -> Profile:
        """This GPU as a Profile, for any number of ranks.

        Args:
            kernel, link, network: other than the default ones.
            wire_needs_sms: exchanges are NCCL's; copy engines need no SM.
            attention_tflops, alltoall_gbps, attention_slowdown: in place of the catalogue's values.

        Raises:
            ValueError: a kernel of unknown rate, or a link or network that is not in the catalogue.
        """
        catalogue = load()
        kernel, wire = kernel or self.kernel, self.links.get(link or next(iter(self.links)))
        if kernel not in self.known_kernels:
            raise ValueError(
                f"{self.slug}: no rate is known for kernel {kernel!r}, only {', '.join(self.known_kernels)}"
            )
        if wire is None:
            raise ValueError(f"{self.slug}: unknown link {link!r}: choose one of {', '.join(self.links)}")
        if (network or self.network) not in catalogue.networks:
            raise ValueError(f"unknown network {network!r}: choose one of {', '.join(catalogue.networks)}")
        net = catalogue.networks[network or self.network]
        rate = self.attention_tflops[kernel]
        memory = self.numbers["memory_gbps"]
        # Milliseconds to read and write a GB once.
        copied_ms = 2e3 / (_value(memory) * _value(catalogue.common["copy_efficiency"]))
        tokens, heads = _RATED_AT
        sms = int(_value(self.numbers["sms"]))
        flops = 4.0 * tokens**2 * HEAD_DIM * heads
        inner = Level(
            gbps=_value(wire.alltoall_gbps) if alltoall_gbps is None else alltoall_gbps,
            latency_ms=_value(wire.latency_ms),
            ranks=wire.ranks,
            rotate_gbps=_rotate_gbps(wire, alltoall_gbps),
            per_peer_ms=_value(wire.per_peer_ms),
        )
        outer = Level(
            gbps=_value(net.nominal_gbps) * _value(net.efficiency),
            latency_ms=_value(net.latency_ms),
            per_peer_ms=_value(net.per_peer_ms),
        )
        used = [*catalogue.common.values(), wire.latency_ms, wire.attention_slowdown]
        used += [rate, wire.alltoall_gbps, wire.rotate_gbps, memory, self.numbers["sms"]]
        assumed = [number.reason for number in used if number is not None and number.reason is not None]
        if (reason := catalogue.persistent.get(kernel)) is not None:
            assumed.append(reason)
        return Profile(
            hardware=self.slug,
            device="cuda",
            world_size=0,
            backend="nccl",
            link=wire.name,
            kernel=kernel,
            dtype="bfloat16",
            head_dim=HEAD_DIM,
            batch=1,
            attend=(AttendPoint(tokens, heads, flops / ((attention_tflops or _value(rate)) * 1e9)),),
            # A bridge joins two cards only; what lies beyond it is not known.
            levels=(inner, outer) if wire.ranks > 2 else (inner,),
            pack_ms_per_gb=copied_ms,
            unpack_ms_per_gb=copied_ms,
            # A merge reads the step's output, widens it, and reads and writes the sum: 18 bytes for every 4 of float32.
            merge_ms_per_gb=copied_ms * 18 / 8,
            host_ms=_value(catalogue.common["host_ms"]),
            attention_slowdown=_value(wire.attention_slowdown) if attention_slowdown is None else attention_slowdown,
            holds_sms=kernel in catalogue.persistent,
            wire_needs_sms=wire_needs_sms,
            sms=sms,
            assumed=tuple(dict.fromkeys(assumed)),
        )

    def network_assumptions(self, network: str | None = None) -> tuple[str, ...]:
        """What a prediction over more ranks than the inner link connects assumes besides."""
        net = load().networks[network or self.network]
        reasons = (net.efficiency.reason, net.latency_ms.reason)
        return (f"nodes joined by {net.title}, from general knowledge", *(r for r in reasons if r))


@dataclass(frozen=True)
class Catalogue:
    """All of it. `persistent` has the kernels that hold every SM, each with why that is assumed, None where seen."""

    gpus: dict[str, Gpu]
    aliases: dict[str, str]
    networks: dict[str, Network]
    common: dict[str, Number]
    persistent: dict[str, str | None]
    sources: dict[str, str]


def gpu(name: str) -> Gpu:
    """The GPU of that slug or alias.

    Raises:
        ValueError: no such GPU; the message lists those that there are.
    """
    catalogue = load()
    slug = catalogue.aliases.get(name.lower().replace("_", "-").replace(" ", "-"))
    if slug is None:
        raise ValueError(f"unknown GPU {name!r}: choose one of {', '.join(catalogue.gpus)}")
    return catalogue.gpus[slug]


@cache
def load() -> Catalogue:
    """Read and check the catalogue, once.

    Raises:
        ValueError: a number without a source, tag or reason, or of unknown source.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    plain = yaml.load(PATH.read_text(), Loader=loader)
    sources = plain["sources"]
    kinds = plain["link_kinds"]

    def number(where: str, entry: Any) -> Number:
        read = Number.read(where, entry)
        if read.source is not None and read.source not in sources:
            raise ValueError(f"{PATH.name}: {where}: source {read.source!r} is not listed under sources")
        return read

    def link(where: str, name: str, entry: dict[str, Any]) -> Link:
        kind = {key: number(f"link_kinds.{entry['kind']}.{key}", value) for key, value in kinds[entry["kind"]].items()}
        rotate = number(f"{where}.rotate_gbps", entry["rotate_gbps"]) if "rotate_gbps" in entry else None
        nominal, alltoall = (number(f"{where}.{key}", entry[key]) for key in ("nominal_gbps", "alltoall_gbps"))
        return Link(name, entry["kind"], entry["ranks"], nominal, alltoall, rotate, **kind)

    gpus: dict[str, Gpu] = {}
    aliases: dict[str, str] = {}
    for slug, entry in plain["gpus"].items():
        numbers = {
            key: number(f"{slug}.{key}", entry[key])
            for key in ("bf16_tflops", "gemm_tflops", "memory_gb", "memory_gbps", "sms")
            if key in entry
        }
        rates = {k: number(f"{slug}.attention_tflops.{k}", v) for k, v in entry["attention_tflops"].items()}
        links = {k: link(f"{slug}.links.{k}", k, v) for k, v in entry["links"].items()}
        gpus[slug] = Gpu(slug, entry["name"], numbers, entry["kernel"], rates, links, entry["network"])
        aliases |= dict.fromkeys((slug, *entry.get("aliases", ())), slug)
    shared = {k: number(f"network_common.{k}", v) for k, v in plain["network_common"].items()}
    networks = {
        k: Network(k, v["name"], number(f"networks.{k}.nominal_gbps", v["nominal_gbps"]), **shared)
        for k, v in plain["networks"].items()
    }
    common = {k: number(f"common.{k}", v) for k, v in plain["common"].items()}
    persistent = {k: number(f"persistent.{k}", {"value": 1, **v}).reason for k, v in plain["persistent"].items()}
    return Catalogue(gpus, aliases, networks, common, persistent, sources)


def _value(number: Number) -> float:
    assert number.value is not None
    return number.value


def _rotate_gbps(wire: Link, alltoall_gbps: float | None) -> float | None:
    """The rate to one neighbour, varied as the all-to-all's is."""
    if wire.rotate_gbps is None or wire.rotate_gbps.value is None:
        return None
    factor = 1.0 if alltoall_gbps is None else alltoall_gbps / _value(wire.alltoall_gbps)
    return wire.rotate_gbps.value * factor
