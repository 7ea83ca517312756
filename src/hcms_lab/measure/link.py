"""Give the emulated link the bandwidth at which serial Ulysses has a wanted communication ratio."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import torch

from hcms.links import emulated, ghost, links
from hcms.schedule.cost import Workload
from hcms_lab.ground.errors import UsageError
from hcms_lab.measure.cases import EMULATED, Case, Point
from hcms_lab.measure.contestant import contestant
from hcms_lab.measure.inputs import World
from hcms_lab.measure.job import Job
from hcms_lab.measure.launch import Rank
from hcms_lab.measure.timing import gathered, timed_call

_CALLS = 5
_ROUNDS = 3


def settle(rank: Rank, job: Job, point: Point, gbps_of_ratio: dict[float, float]) -> float | None:
    """Set the link for a point; returns its bandwidth in GB/s, None where it is as fast as it can be.

    Raises:
        UsageError: the ratio lies below what this machine's own exchange takes.
    """
    if links()[job.link].one_for_all:
        ghost.WIRE.slow(gbps=job.gbps, latency_us=job.latency_us)
        return job.gbps
    if job.link != EMULATED:
        return None
    gbps = job.gbps
    if gbps is None and point.link_ratio is not None:
        gbps = gbps_of_ratio.get(point.link_ratio)
        if gbps is None or job.ratio_at == "each":
            gbps = gbps_of_ratio[point.link_ratio] = _derive_gbps(rank, job, _where(job, point), point.link_ratio)
    emulated.set_link(gbps, job.latency_us)
    return gbps


def _where(job: Job, point: Point) -> Point:
    """The point itself, or one of as many frames as the link is to be derived at."""
    if not isinstance(job.ratio_at, int) or not point.frames:
        return point
    tokens = job.ratio_at * (point.seq_len // point.frames)
    if tokens % point.ranks:
        raise UsageError(f"link.ratio_at={job.ratio_at}: {tokens} tokens cannot be divided among {point.ranks} ranks")
    return replace(point, frames=job.ratio_at, seq_len=tokens)


def _derive_gbps(rank: Rank, job: Job, point: Point, ratio: float) -> float:
    """Measure serial Ulysses, correct the link by what is missing from the wanted ratio, and measure again."""
    if point.ranks == 1:
        raise UsageError("link.ratio: one rank exchanges nothing, so it has no communication ratio; give link.gbps")
    world = World(point, job.seed, rank.rank, rank.device, ghost=False)
    inputs = {f"{name}_BLNH": x for name, x in world.shard(0).items()}
    ulysses = contestant(Case("ulysses", None), point.kernel, None, None)

    def median_times_ms(gbps: float | None) -> tuple[float, float]:
        """Medians of the slowest rank: attention, and everything else, of serial Ulysses on a link of `gbps`."""
        emulated.set_link(gbps, job.latency_us)
        samples = []
        with torch.inference_mode():
            ulysses(**inputs)
            for _ in range(_CALLS):
                _, wall_ms = timed_call(rank, lambda: ulysses(**inputs))
                assert ulysses.timeline is not None
                samples.append((ulysses.timeline.attention_ms, wall_ms))
        by_rank = gathered(rank, samples)
        attention_ms = median(max(a for a, _ in ranks) for ranks in zip(*by_rank, strict=True))
        wall_ms = median(max(w for _, w in ranks) for ranks in zip(*by_rank, strict=True))
        return attention_ms, wall_ms - attention_ms

    attention_ms, floor_ms = median_times_ms(None)
    lowest = floor_ms / (floor_ms + attention_ms)
    layer = Workload(point.seq_len, point.heads, point.ranks, point.head_dim, point.batch, point.dtype)
    nbytes = layer.off_rank(4 * layer.tensor_bytes(layer.heads_a_rank))
    wire_ms = attention_ms * ratio / (1 - ratio) - floor_ms
    for _ in range(_ROUNDS):
        if wire_ms <= 0:
            raise UsageError(
                f"link.ratio={ratio}: this machine's own exchange already takes {lowest:.3f} at {point.seq_len} tokens "
                f"on {point.ranks} ranks; give a larger ratio, or lowest"
            )
        attention_ms, communication_ms = median_times_ms(nbytes / wire_ms / 1e6)
        wire_ms += attention_ms * ratio / (1 - ratio) - communication_ms
    if wire_ms <= 0:
        raise UsageError(f"link.ratio={ratio}: not reachable at {point.seq_len} tokens; the lowest is {lowest:.3f}")
    return nbytes / wire_ms / 1e6
