"""A profile: what exchange and attention cost on some ranks, measured by `calibrate` or taken from the catalogue.

It answers three questions by size alone: how long is an exchange, a rotation, a call of the kernel. What a schedule's
operation amounts to in those sizes is `cost.py`'s matter. Kept as YAML that a reader can check by eye. GB is 10^9
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from hcms.schedule.plan import Chosen

SCHEMA = 1
TILE_ROWS = 128  # queries that one SM attends to at a time in the flash-attention family at head size 128


@dataclass(frozen=True, slots=True)
class AttendPoint:
    """One measured call of the kernel: whole-sequence attention of `heads` heads.

    Args:
        ms: of a call by itself.
        sustained_ms: of one among others of its size without a pause, where a GPU's power limit sets the clock; None is
            `ms`.
    """

    seq_len: int
    heads: int
    ms: float
    sustained_ms: float | None = None

    def at_ms(self, hot: float) -> float:
        """Between a call by itself (0) and one without a pause (1)."""
        return self.ms + hot * ((self.sustained_ms or self.ms) - self.ms)


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
    sms: int | None = None
    ports: int = 1
    assumed: tuple[str, ...] = ()
    chosen: tuple[Chosen, ...] = ()
    schema: int = SCHEMA

    @property
    def knows_sustained(self) -> bool:
        return any(p.sustained_ms is not None for p in self.attend)

    def attention_ms(
        self, seq_len: int, heads: int, batch: int = 1, *, parts: int = 1, without_sms: int = 0, hot: float = 0.0
    ) -> float:
        """Time of one call of the kernel: `seq_len` keys, 1 / `parts` of as many queries, `heads` heads; on a GPU,
        with `without_sms` of its SMs left to others, at the clock of a call by itself (`hot` 0) or of calls without a
        pause (1).

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
            return self._at_length_ms(length, at_length, hot) / at_length

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

    def _at_length_ms(self, length: int, work: float, hot: float) -> float:
        """Time of `work` at a measured length."""
        at_length = [p for p in self.attend if p.seq_len == length]
        points = sorted((self._work(p.seq_len, p.heads, self.batch), p.at_ms(hot)) for p in at_length)
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
        for point in plain["attend"]:
            if point["sustained_ms"] is None:
                del point["sustained_ms"]
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
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # a ValueError of what is no text, or of a date that cannot be
        plain = None
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: not a profile: it holds no YAML mapping")
    again = "calibrate again: python experiments/run.py +exp=calibrate"
    if plain.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema is {plain.get('schema')!r}, wanted {SCHEMA}; {again}")
    known = {f.name: f for f in fields(Profile)}
    for name in plain:
        if name not in known:
            raise ValueError(f"{path}: unknown field {name!r}, wanted only {', '.join(known)}; {again}")
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
    if not all(0 < ms < math.inf for p in attend for ms in (p.ms, p.at_ms(1.0))) or not all(
        x.gbps > 0 and x.latency_ms >= 0 for x in levels
    ):
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
