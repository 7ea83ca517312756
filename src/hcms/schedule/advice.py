"""Advice for a GPU that is not at hand: is HCMS worth it there, with which cut, and how sure is that?

The verdict's rule, by the communication ratio rho of Ulysses (the paper's marks: 10 and 20 %) and the interval of the
predicted gain over the faster of `ulysses` and `ulysses-packed`:

1. the interval's upper end below 1 %: do not;
2. rho of 20 % or more, and the lower end 1 % or more: use it;
3. rho between 10 and 20 %, and the lower end 5 % or more: use it;
4. otherwise: little to gain.

Under a kernel that holds every SM an exchange of NCCL's overlaps only where it happens to start before attention does:
the interval then reaches down to no gain at all, so that nobody is told to use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from hcms.schedule.catalogue import SPREAD, Gpu
from hcms.schedule.choose import Choice, choose
from hcms.schedule.cost import Workload, WorkloadCosts, predict
from hcms.schedule.cut import usual_cuts
from hcms.schedule.schedule import Schedule, ring, serial
from hcms.schedule.zero import zero

USE, LITTLE, DO_NOT = "use it", "little to gain", "do not"
KEPT_SMS = (8, 16)  # that a plan may keep for communication
_MOST_CHUNKS = 6


@dataclass(frozen=True)
class Advice:
    """Predictions for one layer on one GPU type and link.

    Args:
        gpu, link, kernel: what was asked about.
        workload: the layer, ranks included.
        comm_ratio: rho, copies and latency included; `wire_ratio` is that of bytes over bandwidth alone.
        choice: the best chunked plan, whether or not it pays.
        ulysses_ms, ulysses_packed_ms, ring_ms, hcms_ms: predicted latencies of the layer.
        gain, gain_low, gain_high: of HCMS over the faster Ulysses. The ends vary attention's rate and the link's
            bandwidth by 10 % or the catalogue's ranges, and the slowdown by its range: the lower end with the plan as
            it is, the upper end also with the plan that would suit best there.
        verdict: `use it`, `little to gain` or `do not`.
        assumed: inputs that nobody published.
        freed_gain: where the kernel holds every SM, the gain of `hcms-zero` if exchanges needed none, as copy engines
            do not; None for other kernels.
        kept_gain, kept_low, kept_sms: the gain of `hcms-zero` there with so many SMs kept for NCCL (`+sms8`), and its
            lower end, as of `gain`, if a few blocks of NCCL's are as fast as many; None and 0 for other kernels, or a
            GPU whose SMs are not known.
    """

    gpu: Gpu
    link: str
    kernel: str
    workload: Workload
    comm_ratio: float
    wire_ratio: float
    choice: Choice
    ulysses_ms: float
    ulysses_packed_ms: float
    ring_ms: float
    hcms_ms: float
    gain: float
    gain_low: float
    gain_high: float
    verdict: str
    assumed: tuple[str, ...]
    freed_gain: float | None
    kept_gain: float | None
    kept_low: float | None
    kept_sms: int

    @property
    def fastest(self) -> str:
        """The method of least predicted latency."""
        predicted = {
            "ulysses": min(self.ulysses_ms, self.ulysses_packed_ms),
            "hcms": self.hcms_ms,
            "ring": self.ring_ms,
        }
        return min(predicted, key=lambda method: predicted[method])


def advise(
    gpu: Gpu, workload: Workload, *, kernel: str | None = None, link: str | None = None, network: str | None = None
) -> Advice:
    """Predict one layer on one GPU type.

    With more ranks than its own link connects, a network joins the nodes. Assumed there: one adapter a GPU; traffic
    inside a node and between nodes flows at the same time, so that the slower of both decides; no contention between
    nodes; a ring's slowest hop is one between nodes.

    Raises:
        ValueError: a kernel, link or network that the catalogue does not know for this GPU, or more ranks than a link
            without a network connects.
    """
    kernel = kernel or gpu.kernel
    link = link or next(iter(gpu.links))
    costs = WorkloadCosts(gpu.profile(kernel=kernel, link=link, network=network), workload)
    heads, ranks, M = workload.heads, workload.ranks, workload.heads_a_rank
    choice = choose(costs, heads, ranks, margin=-1.0)
    hcms = choice.schedule()

    def varied(tflops: float, gbps: float, slowdown: float) -> WorkloadCosts:
        profile = gpu.profile(
            kernel=kernel,
            link=link,
            network=network,
            attention_tflops=tflops,
            alltoall_gbps=gbps,
            attention_slowdown=slowdown,
        )
        return WorkloadCosts(profile, workload)

    wire = gpu.links[link]
    tflops, gbps = gpu.attention_tflops[kernel].spread(SPREAD), wire.alltoall_gbps.spread(SPREAD)
    slowdown = wire.attention_slowdown.spread(0.0)
    gain = _gain(costs, hcms, M)
    gains = [gain, *(_gain(varied(*ends), hcms, M) for ends in product(tflops, gbps, slowdown))]
    # Where communication weighs most and disturbs least, another plan may suit better.
    gains.append(choose(varied(tflops[1], gbps[0], slowdown[0]), heads, ranks, margin=-1.0).gain)
    freed_gain, kept_gain, kept_low, kept_sms = None, None, None, 0
    if costs.holds_sms:
        gains.append(min(0.0, gain))
        freed = gpu.profile(kernel=kernel, link=link, network=network, wire_needs_sms=False, attention_slowdown=1.0)
        freed_costs = WorkloadCosts(freed, workload, graph=True)
        freed_gain = _gain(freed_costs, _best_zero(freed_costs, M, 0), M)
        if freed.sms is not None:
            graphed = WorkloadCosts(costs.profile, workload, graph=True)
            best = min((_best_zero(graphed, M, sms) for sms in KEPT_SMS), key=lambda p: predict(p, graphed).duration_ms)
            ends = [WorkloadCosts(varied(*e).profile, workload, graph=True) for e in product(tflops, gbps, slowdown)]
            kept_gain, kept_sms = _gain(graphed, best, M), best.comm_sms
            kept_low = min(kept_gain, *(_gain(end, best, M) for end in ends))
    assumed = costs.profile.assumed
    if ranks > wire.ranks:
        assumed += gpu.network_assumptions(network)
    return Advice(
        gpu=gpu,
        link=link,
        kernel=kernel,
        workload=workload,
        comm_ratio=costs.comm_ratio,
        wire_ratio=costs.wire_ratio,
        choice=choice,
        ulysses_ms=predict(serial((M,), split_qkv=True), costs).duration_ms,
        ulysses_packed_ms=predict(serial((M,)), costs).duration_ms,
        ring_ms=predict(ring(ranks), costs).duration_ms,
        hcms_ms=predict(hcms, costs).duration_ms,
        gain=gain,
        gain_low=min(gains),
        gain_high=max(gains),
        verdict=verdict(costs.comm_ratio, min(gains), max(gains)),
        assumed=assumed,
        freed_gain=freed_gain,
        kept_gain=kept_gain,
        kept_low=kept_low,
        kept_sms=kept_sms,
    )


def _best_zero(costs: WorkloadCosts, M: int, comm_sms: int) -> Schedule:
    """The plan of `hcms-zero` that is predicted to be fastest of those that are tried."""
    plans = (
        zero(cut, ends=(parts, parts), fill=fill, comm_sms=comm_sms)
        for cut in usual_cuts(M, _MOST_CHUNKS)
        for parts in (1, 2)
        for fill in (False, True)
    )
    return min(plans, key=lambda plan: predict(plan, costs).duration_ms)


def verdict(comm_ratio: float, gain_low: float, gain_high: float) -> str:
    """The rule at the top of this module."""
    if gain_high < 0.01:
        return DO_NOT
    if (comm_ratio >= 0.20 and gain_low >= 0.01) or (comm_ratio >= 0.10 and gain_low >= 0.05):
        return USE
    return LITTLE


def _gain(costs: WorkloadCosts, hcms: Schedule, M: int) -> float:
    """Of a schedule over the faster Ulysses."""
    return _baseline_ms(costs, M) / predict(hcms, costs).duration_ms - 1


def _baseline_ms(costs: WorkloadCosts, M: int) -> float:
    """The faster Ulysses'."""
    return min(predict(serial((M,), split_qkv=split), costs).duration_ms for split in (True, False))
