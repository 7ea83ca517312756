"""`plan: auto`: the fastest predicted cut, order and depth, or plain Ulysses where chunks do not pay.

M heads have 2^(M - 1) cuts, each with up to 2(M - 1) orders and depths. They are not enumerated. What is searched
instead is a lower bound of a cut's time that holds for *every* order and depth:

    E_c = max(E_(c-1), packed by then) + exchange_c     the earliest end of chunk c's exchange, no return before it
    G_c = max(G_(c-1), E_c) + unpack_c + attend_c       the earliest end of its attention
    Q_c = max(Q_(c-1), G_c) + return_c                  the earliest end of its return
    time >= max(Q_K, all exchanges + all returns where they share a port, all that the host computes, each + what must
    still follow)

On a GPU (the host only launches) the bound is reached, launches aside, by prefetching every chunk: exchanges first
gives every E_c and so every G_c its least value, the returns then queue, and any order has to carry the same bytes on
the one port and to start returns c ... K after G_c. So there the deepest prefetch is at least as good as any other
order, and a third lane that shares the port gains nothing. On a CPU, where packing everything first delays the first
attention, or where launches take as long as chunks do, the bound is not always reached; how far the choice is from it
at most is reported as `gap`.

The bound's terms grow with those of the chunks so far, so a dynamic program over (chunks so far, heads left) needs to
keep only beginnings that no other beats in every term, and none that cannot end below the best time already found.
The ends it finds are priced exactly, by the simulator, for all orders and depths that can matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hcms.schedule.contend import Stage
from hcms.schedule.cost import predict
from hcms.schedule.cut import Cut, even, format_cut, tapered
from hcms.schedule.schedule import COMPUTE, First, Op, Schedule, serial, three_lane, two_lane
from hcms.schedule.simulate import Costs, OpCost

TIE = 1e-3  # predictions closer than this are alike: the simpler plan is taken
EXACT_CUTS = 40  # cuts that are priced exactly at most


@dataclass(frozen=True, slots=True)
class Choice:
    """What `choose` decided and why. Times are predictions.

    Args:
        method: `ulysses`, `ulysses-packed`, `hcms` or `hcms-3lane`.
        cut: heads of each chunk; one chunk where Ulysses is kept.
        prefetch: chunks exchanged ahead; None is all of them.
        first: which goes onto the communication lane first, `exchange` or `return`.
        predicted_ms: of this method with this cut.
        baseline: the faster of `ulysses` and `ulysses-packed`, and its time `baseline_ms`.
        gain: the best chunked plan's, baseline / it - 1, whether or not it was taken.
        gap: no plan at all is predicted to be faster than the best chunked one by more than this share.
        reason: all of this in a sentence.
    """

    method: str
    cut: Cut
    prefetch: int | None
    first: First
    predicted_ms: float
    baseline: str
    baseline_ms: float
    gain: float
    gap: float
    reason: str

    @property
    def plan(self) -> str:
        """The cut as configurations write it."""
        return format_cut(self.cut)

    def schedule(self) -> Schedule:
        """The schedule that this choice names."""
        if self.method in ("ulysses", "ulysses-packed"):
            return serial(self.cut, split_qkv=self.method == "ulysses")
        return _Plan(self.method, self.cut, self.prefetch, self.first).schedule()


def choose(costs: Costs, heads: int, ranks: int, *, margin: float = 0.01) -> Choice:
    """The plan that is predicted to be fastest, if it beats Ulysses by more than `margin`.

    Args:
        costs: of the layer at hand; an operation's must depend on the schedule only through its chunk's heads and
            whether the schedule overlaps.
        heads: N, all heads.
        ranks: P.
        margin: the gain, as a share, up to which Ulysses is kept; -1 takes the best chunked plan whatever it costs.

    Raises:
        ValueError: ranks that do not divide the heads.
    """
    if heads % ranks:
        raise ValueError(f"{heads} heads cannot be divided among {ranks} ranks")
    M = heads // ranks
    whole = (M,)
    baselines = {
        name: predict(serial(whole, split_qkv=name == "ulysses"), costs).duration_ms
        for name in ("ulysses", "ulysses-packed")
    }
    baseline = min(baselines, key=lambda name: baselines[name])
    baseline_ms = baselines[baseline]

    def keep(why: str, gain: float, gap: float) -> Choice:
        return Choice(baseline, whole, None, "exchange", baseline_ms, baseline, baseline_ms, gain, gap, why)

    if ranks == 1:
        return keep(f"{baseline}: one rank has nothing to exchange", 0.0, 0.0)
    if M == 1:
        return keep(f"{baseline}: one head a rank cannot be cut", 0.0, 0.0)
    best, best_ms, bound_ms = _search(costs, M)
    gain = baseline_ms / best_ms - 1
    gap = max(0.0, best_ms / bound_ms - 1)
    cut = format_cut(best.cut)
    if gain <= margin:
        why = f"{baseline}: the best cut, {cut}, is predicted at {gain:+.1%}, within the margin of {margin:.1%}"
        return keep(why, gain, gap)
    why = (
        f"{best.method} {cut}: predicted {best_ms:.4g} ms, {gain:.1%} faster than {baseline} ({baseline_ms:.4g} ms); "
        f"no other plan is predicted more than {gap:.1%} faster"
    )
    return Choice(best.method, best.cut, best.prefetch, best.first, best_ms, baseline, baseline_ms, gain, gap, why)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A chunked plan. Prefetching all but the last chunk is prefetching all: `prefetch` is then None."""

    method: str
    cut: Cut
    prefetch: int | None = None
    first: First = "exchange"

    def schedule(self) -> Schedule:
        build = three_lane if self.method == "hcms-3lane" else two_lane
        return build(self.cut, prefetch=self.prefetch, first=self.first)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """What a chunk of so many heads costs: the host's part, 0 where it only launches, and the link's."""

    pack: float
    exchange: float
    compute: float  # unpack, attend, and pack the output
    back: float
    finish: float

    @classmethod
    def of(cls, costs: Costs, schedule: Schedule) -> _Chunk:
        def cost(kind: str) -> OpCost:
            return next(costs.op_cost(op, schedule) for op in schedule.ops if op.kind == kind and op.chunk == 0)

        exchange, attend, back = cost("exchange"), cost("attend"), cost("return")
        if not costs.host_computes:
            return cls(0.0, exchange.lane_ms, attend.lane_ms, back.lane_ms, 0.0)
        attend_ms = attend.host_ms + attend.lane_ms + attend.finish_ms
        compute_ms = exchange.finish_ms + attend_ms + back.host_ms
        return cls(exchange.host_ms, exchange.lane_ms, compute_ms, back.lane_ms, back.finish_ms)


# A beginning of a cut: E, G, Q as in the module's docstring, then sums over its chunks: compute, link, pack, finish.
_Terms = tuple[float, float, float, float, float, float, float]
_Start = tuple[_Terms, Cut]


def _search(costs: Costs, M: int) -> tuple[_Plan, float, float]:
    """The best chunked plan, its predicted ms, and a lower bound of all plans' ms."""
    one_port = getattr(costs, "ports", 1) == 1
    methods = ("hcms",) if one_port else ("hcms", "hcms-3lane")
    first_op = two_lane((M,)).ops[0]
    host_counts = costs.host_computes or costs.op_cost(first_op, two_lane((M,))).host_ms > 0
    chunk = [_Chunk(0, 0, 0, 0, 0)] + [
        _Chunk.of(costs, two_lane((m, M - m) if m < M else (M,))) for m in range(1, M + 1)
    ]
    least_compute = _least([c.compute for c in chunk])
    least_attended = _least([c.pack + c.compute for c in chunk])
    least_host = _least([c.pack + c.compute + c.finish for c in chunk])
    least_link = _least([c.exchange + c.back for c in chunk])
    least_end = min(c.back + c.finish for c in chunk[1:])

    def extended(terms: _Terms, m: int) -> _Terms:
        E, G, Q, compute, link, pack, finish = terms
        c = chunk[m]
        pack += c.pack
        E = max(E, pack) + c.exchange
        G = max(G, E) + c.compute
        return E, G, max(Q, G) + c.back, compute + c.compute, link + c.exchange + c.back, pack, finish + c.finish

    def bound_ms(terms: _Terms, cut: Cut) -> float:
        """The whole cut's time is at least this."""
        _, G, Q, compute, link, pack, finish = terms
        first, last = chunk[cut[0]], chunk[cut[-1]]
        host = pack + compute
        on_port = first.pack + link + last.finish if one_port else 0.0
        return max(Q + last.finish, max(G, host) + finish, host + last.back + last.finish, on_port)

    def hope_ms(terms: _Terms, left: int) -> float:
        """No ending of this beginning takes less."""
        _, G, Q, compute, link, pack, finish = terms
        on_port = link + least_link[left] if one_port else 0.0
        attended = max(G + least_compute[left], pack + compute + least_attended[left])
        return max(Q, attended + least_end, pack + compute + finish + least_host[left], on_port)

    best, best_ms = _Plan("hcms", (M,)), float("inf")
    lowest_ms = float("inf")

    def price(cut: Cut) -> None:
        nonlocal best, best_ms
        for plan in _usual_orders(cut, methods, host_counts):
            ms = predict(plan.schedule(), costs).duration_ms
            if ms < best_ms * (1 - TIE):
                best, best_ms = plan, ms

    for chunks in range(1, min(M, 5) + 1):
        for cut in dict.fromkeys((even(M, chunks), tapered(M, chunks))):
            price(cut)
    # Beginnings this close count as alike: once a chunk at most, so that a whole cut is off by M times this.
    slack_ms = TIE * best_ms / (4 * M)
    # One layer a chunk count; starts[used] are the undominated beginnings that use so many heads.
    starts: dict[int, list[_Start]] = {0: [((0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), ())]}
    priced = 0
    while starts:
        longer: dict[int, list[_Start]] = {}
        whole: list[tuple[float, Cut]] = []
        limit_ms = best_ms * (1 - TIE)
        for used, beginnings in starts.items():
            for terms, cut in beginnings:
                for m in range(1, M - used + 1):
                    further = extended(terms, m)
                    left = M - used - m
                    if left == 0:
                        whole.append((bound_ms(further, (*cut, m)), (*cut, m)))
                    elif hope_ms(further, left) < limit_ms:
                        _keep(longer.setdefault(used + m, []), further, (*cut, m), slack_ms)
        whole.sort()
        if whole:
            lowest_ms = min(lowest_ms, whole[0][0] - M * slack_ms)
        for ms, cut in whole:
            if ms >= best_ms * (1 - TIE) or priced >= EXACT_CUTS:
                break
            priced += 1
            price(cut)
        starts = longer
    lowest_ms = min(lowest_ms, best_ms * (1 - TIE))
    best, best_ms = _settle(best, best_ms, methods, costs)
    return best, best_ms, min(lowest_ms, best_ms)


def _least(cost: list[float]) -> list[float]:
    """For every number of heads, the least sum that chunks with these costs can add up to."""
    least = [0.0]
    for heads in range(1, len(cost)):
        least.append(min(cost[m] + least[heads - m] for m in range(1, heads + 1)))
    return least


def _keep(kept: list[_Start], terms: _Terms, cut: Cut, slack_ms: float) -> None:
    """Add a beginning unless one that is kept is as good in every term; drop those that it is as good as."""
    E, G, Q, compute, link, pack, finish = (term + slack_ms for term in terms)
    for (e, g, q, c, li, p, f), _ in kept:
        if g <= G and q <= Q and e <= E and c <= compute and li <= link and p <= pack and f <= finish:
            return
    E, G, Q, compute, link, pack, finish = terms
    kept[:] = [
        start
        for start in kept
        if start[0][1] < G
        or start[0][2] < Q
        or start[0][0] < E
        or start[0][3] < compute
        or start[0][4] < link
        or start[0][5] < pack
        or start[0][6] < finish
    ]
    kept.append((terms, cut))


def _usual_orders(cut: Cut, methods: tuple[str, ...], host_counts: bool) -> Iterator[_Plan]:
    """The deepest prefetch, which is best where the host costs nothing, and otherwise the shallowest two."""
    for method in methods:
        yield _Plan(method, cut)
        for depth in range(1, min(3, len(cut) - 1) if host_counts else 1):
            yield _Plan(method, cut, depth, "exchange")
            yield _Plan(method, cut, depth, "return")


@dataclass(frozen=True, slots=True)
class _SlowerLink:
    """The same costs with the communication lanes 10 % slower."""

    costs: Any

    def __getattr__(self, name: str) -> Any:
        """Whatever else these costs say."""
        return getattr(self.costs, name)

    @property
    def host_computes(self) -> bool:
        return self.costs.host_computes

    @property
    def ports(self) -> int:
        return getattr(self.costs, "ports", 1)

    @property
    def stages(self) -> Callable[[Op, Schedule], tuple[Stage, ...]]:
        priced = self.costs.stages

        def slower(op: Op, schedule: Schedule) -> tuple[Stage, ...]:
            return tuple(s._replace(ms=s.ms * 1.1) if s.occupies == "wire" else s for s in priced(op, schedule))

        return slower

    def op_cost(self, op: Op, schedule: Schedule) -> OpCost:
        cost = self.costs.op_cost(op, schedule)
        return cost if op.lane == COMPUTE else OpCost(cost.lane_ms * 1.1, cost.host_ms, cost.finish_ms)


def _settle(best: _Plan, best_ms: float, methods: tuple[str, ...], costs: Costs) -> tuple[_Plan, float]:
    """Among all orders and depths of the best cut that are alike: two lanes before three, then the one that loses least
    on a slower link, then the shallowest, which holds the fewest chunks in flight."""
    priced: list[tuple[float, _Plan]] = [(best_ms, best)]
    for method in methods:
        for depth in (*range(1, len(best.cut) - 1), None):
            for first in ("exchange", "return") if depth is not None else ("exchange",):
                plan = _Plan(method, best.cut, depth, first)
                priced.append((predict(plan.schedule(), costs).duration_ms, plan))
    alike_ms = min(ms for ms, _ in priced) * (1 + TIE)
    alike = [(ms, plan) for ms, plan in priced if ms <= alike_ms]
    slower_ms = [predict(plan.schedule(), _SlowerLink(costs)).duration_ms for _, plan in alike]
    robust_ms = min(slower_ms) * (1 + TIE)
    robust = [x for x, ms in zip(alike, slower_ms, strict=True) if ms <= robust_ms]
    ms, plan = min(robust, key=lambda x: (x[1].method, x[1].prefetch or len(best.cut), x[1].first))
    return plan, ms
