"""A profile: what exchange and attention cost on some ranks, measured by `calibrate` or taken from the catalogue.

It answers three questions by size alone: how long is an exchange, a rotation, a call of the kernel. What a schedule's
operation amounts to in those sizes is `cost.py`'s matter. Kept as YAML that a reader can check by eye. GB is 10^9
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import median, median_low
from typing import Any

import yaml

from hcms.schedule.plan import Chosen

SCHEMA = 1
TILE_ROWS = 128  # queries that one SM attends to at a time in the flash-attention family at head size 128


@dataclass(frozen=True, slots=True)
class AttendPoint:
    """One measured call of the kernel: whole-sequence attention of `heads` heads."""

    seq_len: int
    heads: int
    ms: float


@dataclass(frozen=True, slots=True)
class Level:
    """A link level: what connects `ranks` neighbouring ranks (None: all of them).

    Args:
        gbps: 10^9 off-rank bytes a second that a rank sends in an all-to-all (nccl-tests' busbw).
        latency_ms: of one collective.
        ranks: how many ranks this level connects; a faster, inner level connects fewer.
        rotate_gbps: the rate of sending to one neighbour; None is `gbps`.
        per_peer_ms: added to the latency for each peer that is reached over this level.
    """

    gbps: float
    latency_ms: float = 0.0
    ranks: int | None = None
    rotate_gbps: float | None = None
    per_peer_ms: float = 0.0


@dataclass(frozen=True)
class Profile:
    """Costs by size on one kind of hardware, link and kernel.

    Args:
        hardware: slug of the hardware.
        device: `cpu` or `cuda`; says whether the issuing thread itself computes, packs and unpacks.
        world_size: P of the ranks that were measured; 0 for a catalogue entry, which serves any.
        backend, link: of the process group, in words (`emulated`, `0.5 GB/s, 50 us`).
        kernel, dtype, head_dim, batch: of the attention calls in `attend`.
        attend: measured calls, at least one.
        levels: the link, innermost level first.
        pack_ms_per_gb, unpack_ms_per_gb: time to copy into and out of exchange buffers.
        merge_ms_per_gb: time to merge a ring step's output, by GB of float32 output.
        lse_slowdown: time of the kernel that also gives the log-sum-exp over that of the plain one.
        host_ms: time that the host needs to issue one operation.
        attention_slowdown: attention's time while communication runs beside it, over its time alone.
        communication_slowdown: the reverse.
        holds_sms: the kernel is persistent: it takes every SM until it ends.
        wire_needs_sms: an exchange runs kernels, as NCCL's does; copy engines need none.
        fill_speedup: attention head by head on one lane, over the same on two: below 1, two lanes do not pay.
        sustained_slowdown: attention's time in a block of nothing else, where a GPU's power limit sets its clock, over
            that of a call by itself.
        sms: streaming multiprocessors that attention's tiles are spread over; None knows no waves (CPU).
        ports: 1 where exchanges and returns share the link's bandwidth, 2 where a third lane has its own.
        assumed: inputs that nobody measured, in words.
        chosen: what trials on these ranks chose.
    """

    hardware: str
    device: str
    world_size: int
    backend: str
    link: str
    kernel: str
    dtype: str
    head_dim: int
    batch: int
    attend: tuple[AttendPoint, ...]
    levels: tuple[Level, ...]
    pack_ms_per_gb: float = 0.0
    unpack_ms_per_gb: float = 0.0
    merge_ms_per_gb: float = 0.0
    lse_slowdown: float = 1.0
    host_ms: float = 0.0
    attention_slowdown: float = 1.0
    communication_slowdown: float = 1.0
    holds_sms: bool = False
    wire_needs_sms: bool = True
    fill_speedup: float = 1.0
    sustained_slowdown: float = 1.0
    sms: int | None = None
    ports: int = 1
    assumed: tuple[str, ...] = ()
    chosen: tuple[Chosen, ...] = ()
    schema: int = SCHEMA

    def attention_ms(self, seq_len: int, heads: int, batch: int = 1, *, parts: int = 1, without_sms: int = 0) -> float:
        """Time of one call of the kernel: `seq_len` keys, 1 / `parts` of as many queries, `heads` heads; on a GPU,
        with `without_sms` of its SMs left to others.

        Between measured head counts, time is piecewise linear in the work; between measured lengths, the time of a
        unit of work is; beyond the measured ones it stays what it was. Work is quadratic in the tokens, and on a GPU
        counted in full waves of tiles, so that a chunk that fills its last wave badly costs as much as one that does.
        """
        lengths = sorted({p.seq_len for p in self.attend})
        below = max((s for s in lengths if s <= seq_len), default=lengths[0])
        above = min((s for s in lengths if s >= seq_len), default=lengths[-1])
        work = self._work(seq_len, heads, batch, parts, without_sms)

        def unit_ms(length: int) -> float:
            """Time of a unit of work at a measured length, for a call as large as the wanted one in heads."""
            at_length = self._work(length, heads, batch, parts, without_sms)
            return self._at_length_ms(length, at_length) / at_length

        low = unit_ms(below)
        if above == below:
            return work * low
        share = (seq_len - below) / (above - below)
        return work * (low + (unit_ms(above) - low) * share)

    def last_wave(self, seq_len: int, heads: int, batch: int = 1, *, parts: int = 1, without_sms: int = 0) -> float:
        """The share of a call's time that its last wave of tiles takes, where that leaves SMs to others; else 0."""
        if self.sms is None:
            return 0.0
        waves = batch * heads * math.ceil(seq_len / parts / TILE_ROWS) / max(1, self.sms - without_sms)
        return 0.0 if waves == math.ceil(waves) else 1 / math.ceil(waves)

    def _work(self, seq_len: int, heads: int, batch: int, parts: int = 1, without_sms: int = 0) -> float:
        """Query-key pairs that the hardware spends time on."""
        if self.sms is None:
            return batch * heads * seq_len**2 / parts
        waves = math.ceil(batch * heads * math.ceil(seq_len / parts / TILE_ROWS) / max(1, self.sms - without_sms))
        return float(waves * self.sms * TILE_ROWS * seq_len)

    def _at_length_ms(self, length: int, work: float) -> float:
        """Time of `work` at a measured length."""
        points = sorted((self._work(p.seq_len, p.heads, self.batch), p.ms) for p in self.attend if p.seq_len == length)
        if work >= points[-1][0]:
            return points[-1][1] * work / points[-1][0]
        (w0, ms0), (w1, ms1) = (points[0], points[1]) if work <= points[0][0] and len(points) > 1 else (points[0],) * 2
        for (low, low_ms), (high, high_ms) in pairwise(points):
            if low <= work <= high and high > low:
                w0, ms0, w1, ms1 = low, low_ms, high, high_ms
        proportional = ms0 * work / w0
        if w1 == w0:
            return proportional
        line = ms0 + (ms1 - ms0) * (work - w0) / (w1 - w0)
        # Below the smallest point, a line from noisy points must not make small chunks cheaper than their share.
        return line if work >= w0 else max(line, proportional)

    def exchange_ms(self, off_rank_bytes: float, ranks: int) -> float:
        """Time on the link of an all-to-all in which every rank sends `off_rank_bytes` to the others together."""
        if ranks == 1:
            return 0.0
        slowest_ms = latency_ms = 0.0
        for level, peers in self._reached(ranks):
            share = peers / (ranks - 1)
            slowest_ms = max(slowest_ms, off_rank_bytes * share / (level.gbps * 1e6))
            latency_ms = max(latency_ms, level.latency_ms) + peers * level.per_peer_ms
        return latency_ms + slowest_ms

    def rotate_ms(self, nbytes: float, ranks: int) -> float:
        """Time on the link of every rank passing `nbytes` to the next: the slowest level that a ring crosses."""
        if ranks == 1:
            return 0.0
        return max(
            level.latency_ms + nbytes / ((level.rotate_gbps or level.gbps) * 1e6) for level, _ in self._reached(ranks)
        )

    def _reached(self, ranks: int) -> Iterable[tuple[Level, int]]:
        """The levels that `ranks` ranks use, each with the peers that a rank reaches over it."""
        inside = 1
        for level in self.levels:
            reach = min(ranks, level.ranks or ranks)
            if reach > inside:
                yield level, reach - inside
                inside = reach
        if inside < ranks:
            raise ValueError(f"{self.hardware}: link {self.link!r} connects at most {inside} ranks, not {ranks}")

    def save(self, path: Path | str) -> None:
        """Write this profile as YAML."""
        path, plain = Path(path), asdict(self)
        for name in ("attend", "levels", "assumed", "chosen"):
            plain[name] = list(plain[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        head = "# Times of attention and exchange on these ranks; GB is 10^9 bytes. Written by +exp=calibrate.\n"
        path.write_text(head + yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=110))


def load(path: Path | str, **wanted: Any) -> Profile:
    """Read a profile and refuse one that is not of the kind wanted.

    Args:
        path: a YAML (or JSON) file that `Profile.save` wrote.
        wanted: fields of `Profile` with the value that they must have (`hardware=`, `world_size=`, `kernel=`, ...);
            None asks for nothing.

    Raises:
        ValueError: no such file, not a profile, an old schema, or a field that is not as wanted; the message names the
            file, the field, what was found and what was wanted.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such profile; python experiments/run.py +exp=calibrate writes one")
    try:
        plain = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        plain = None
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: not a profile: it holds no YAML mapping")
    again = "calibrate again: python experiments/run.py +exp=calibrate"
    if plain.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema is {plain.get('schema')!r}, wanted {SCHEMA}; {again}")
    known = {f.name: f for f in fields(Profile)}
    for name in plain:
        if name not in known:
            raise ValueError(f"{path}: unknown field {name!r}, wanted only {', '.join(known)}")
    for name, field in known.items():
        if name not in plain and field.default is MISSING:
            raise ValueError(f"{path}: field {name} is missing; {again}")
    for name, value in plain.items():
        _check_type(path, name, value, str(known[name].type))
    for name, value in wanted.items():
        if value is not None and plain[name] != value:
            raise ValueError(f"{path}: {name} is {plain[name]!r}, wanted {value!r}; {again}")
    try:
        attend = tuple(AttendPoint(**p) for p in plain.pop("attend"))
        levels = tuple(Level(**level) for level in plain.pop("levels"))
        chosen = tuple(Chosen(**choice) for choice in plain.pop("chosen", ()))
    except TypeError as error:
        raise ValueError(f"{path}: attend, levels or chosen: {error}") from None
    if not attend or not levels:
        raise ValueError(f"{path}: attend or levels is empty, wanted at least one point and one level; {again}")
    if not all(0 < p.ms < math.inf for p in attend) or not all(x.gbps > 0 and x.latency_ms >= 0 for x in levels):
        raise ValueError(f"{path}: attend or levels: a time or a rate that cannot be; {again}")
    assumed = tuple(plain.pop("assumed", ()))
    return Profile(**plain, assumed=assumed, attend=attend, levels=levels, chosen=chosen)


def _check_type(path: Path, name: str, value: Any, annotation: str) -> None:
    """Refuse a value of another type than the field's annotation says."""
    kinds: dict[str, Any] = {
        "str": str,
        "int": int,
        "float": (int, float),
        "bool": bool,
        "int | None": (int, type(None)),
    }
    kind = kinds.get(annotation, list)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{path}: {name} is {value!r}, wanted {'a list' if kind is list else annotation}")


def fit(
    samples: Iterable[Mapping[str, Any]],
    *,
    hardware: str,
    device: str,
    world_size: int,
    backend: str,
    link: str,
    kernel: str,
    dtype: str,
    head_dim: int,
    batch: int = 1,
    sms: int | None = None,
    ports: int = 1,
) -> Profile:
    """A profile from measured samples, each the time of the slowest rank; low medians where a size was measured often.

    Args:
        samples: mappings with `op` and, by op:
            `attend` and `attend_lse`: `seq_len`, `heads`, `ms`;
            `exchange` and `rotate`: `bytes_off_rank`, `ms` (the link alone, packed already);
            `pack`, `unpack`, `merge`: `bytes`, `ms` (merge: bytes of float32 output);
            `host`: `ms`; `interference`: `attention_slowdown`, `communication_slowdown`;
            `occupancy`: `holds_sms`, `wire_needs_sms`, `fill_speedup`; `sustained`: `slowdown` (GPUs).
            `attend` is needed, and `exchange` from 2 ranks on. Without `unpack`, it is taken to be as `pack`; without
            `merge`, as twice `pack`; the rest as nothing.
        hardware, device, world_size, backend, link, kernel, dtype, head_dim, batch, sms, ports: as in `Profile`.

    Raises:
        ValueError: an unknown op, a sample without its fields, or no sample of an op that is needed.
    """
    by_op: dict[str, list[Mapping[str, Any]]] = {name: [] for name in _NEEDS}
    for sample in samples:
        op = sample.get("op")
        if op not in by_op:
            raise ValueError(f"sample {dict(sample)}: unknown op {op!r}, wanted one of {', '.join(by_op)}")
        if lacking := [name for name in _NEEDS[op] if name not in sample]:
            raise ValueError(f"sample {dict(sample)}: {op} needs {', '.join(lacking)}")
        by_op[op].append(sample)
    for op in ("attend", *(("exchange",) if world_size > 1 else ())):
        if not by_op[op]:
            raise ValueError(f"no sample of op {op!r}: a profile of {world_size} ranks needs at least one")

    attend = _medians(by_op["attend"], "seq_len", "heads")
    points = tuple(AttendPoint(seq_len, heads, ms) for (seq_len, heads), ms in sorted(attend.items()))
    latency_ms, gbps = _latency_and_gbps(by_op["exchange"]) if by_op["exchange"] else (0.0, math.inf)
    rotate_gbps = _latency_and_gbps(by_op["rotate"])[1] if by_op["rotate"] else None
    pack = _ms_per_gb(by_op["pack"], 0.0)
    profile = Profile(
        hardware=hardware,
        device=device,
        world_size=world_size,
        backend=backend,
        link=link,
        kernel=kernel,
        dtype=dtype,
        head_dim=head_dim,
        batch=batch,
        attend=points,
        levels=(Level(gbps, latency_ms, rotate_gbps=rotate_gbps),),
        pack_ms_per_gb=pack,
        unpack_ms_per_gb=_ms_per_gb(by_op["unpack"], pack),
        merge_ms_per_gb=_ms_per_gb(by_op["merge"], 2 * pack),
        host_ms=median_low([s["ms"] for s in by_op["host"]] or [0.0]),
        attention_slowdown=max(1.0, median_low([s["attention_slowdown"] for s in by_op["interference"]] or [1.0])),
        communication_slowdown=max(
            1.0, median_low([s["communication_slowdown"] for s in by_op["interference"]] or [1.0])
        ),
        holds_sms=any(s["holds_sms"] for s in by_op["occupancy"]),
        wire_needs_sms=any(s["wire_needs_sms"] for s in by_op["occupancy"]) if by_op["occupancy"] else True,
        fill_speedup=median_low([s["fill_speedup"] for s in by_op["occupancy"]] or [1.0]),
        sustained_slowdown=max(1.0, median_low([s["slowdown"] for s in by_op["sustained"]] or [1.0])),
        sms=sms,
        ports=ports,
    )
    with_lse = _medians(by_op["attend_lse"], "seq_len", "heads")
    slowdowns = [ms / profile.attention_ms(seq_len, heads, batch) for (seq_len, heads), ms in with_lse.items()]
    return replace(profile, lse_slowdown=median(slowdowns or [1.0]))


_NEEDS: dict[str, tuple[str, ...]] = {
    "attend": ("seq_len", "heads", "ms"),
    "attend_lse": ("seq_len", "heads", "ms"),
    "exchange": ("bytes_off_rank", "ms"),
    "rotate": ("bytes_off_rank", "ms"),
    "pack": ("bytes", "ms"),
    "unpack": ("bytes", "ms"),
    "merge": ("bytes", "ms"),
    "host": ("ms",),
    "interference": ("attention_slowdown", "communication_slowdown"),
    "occupancy": ("holds_sms", "wire_needs_sms", "fill_speedup"),
    "sustained": ("slowdown",),
}


def _medians(samples: list[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], float]:
    """Median ms for each size; of an even number the lower, since what disturbs a measurement makes it longer."""
    by_size: dict[tuple[Any, ...], list[float]] = {}
    for sample in samples:
        by_size.setdefault(tuple(sample[key] for key in keys), []).append(float(sample["ms"]))
    return {size: median_low(times) for size, times in by_size.items()}


def _ms_per_gb(samples: list[Mapping[str, Any]], otherwise: float) -> float:
    """Time by size, large samples counting by their size."""
    if not samples:
        return otherwise
    sizes = _medians(samples, "bytes")
    return 1e9 * sum(sizes.values()) / sum(size for (size,) in sizes)


def _latency_and_gbps(samples: list[Mapping[str, Any]]) -> tuple[float, float]:
    """Fit ms = latency + bytes / bandwidth, weighting relative errors alike, with neither part below zero."""
    sizes = [(float(size), ms) for (size,), ms in _medians(samples, "bytes_off_rank").items()]
    weights = [1 / ms**2 for _, ms in sizes]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, sizes, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, sizes, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, sizes, strict=True))
    product = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, sizes, strict=True))
    if mean_x == 0:  # one rank alone sends nothing
        return 0.0, math.inf
    slope = product / spread if spread > 0 else mean_y / mean_x
    latency_ms = mean_y - slope * mean_x
    if slope <= 0:  # faster than can be told: no bytes are too many
        return median(ms for _, ms in sizes), math.inf
    if latency_ms < 0 or spread <= 0:
        latency_ms = 0.0
        slope = sum(w * x * y for w, (x, y) in zip(weights, sizes, strict=True)) / sum(
            w * x * x for w, (x, _) in zip(weights, sizes, strict=True)
        )
    return latency_ms, 1 / (slope * 1e6)
