"""Every method against full attention in float64, and bitwise against Ulysses, on real ranks over Gloo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hcms.attention import SHAPES_KEPT, SequenceParallelAttention
from hcms.methods import METHODS, build_schedule
from hcms.schedule.schedule import Schedule
from ranks import Place, error_bound, largest, new_group, on_ranks, own, whole_qkv

pytestmark = pytest.mark.t1

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS_A_RANK, TOKENS_A_RANK, HEAD_DIM = 5, 6, 16
PLANS = ("5", "even:2", "1-3-1", "4-1", "1-1-1-1-1")  # one chunk, even, uneven twice, one head each
THIN = ("5x3", "1x2-3-1x2", "2x6-3", "1-4x4", "even:5x2")
CASES = [
    *((method, "5") for method in ("ulysses", "ulysses-packed", "ceiling", "ring")),
    *((method, plan) for method in ("hcms-serial", "hcms", "hcms-3lane", "hcms-zero") for plan in PLANS),
    *(("hcms-zero", plan) for plan in THIN),
]


@dataclass(frozen=True)
class Fact:
    """What one call gave on one rank."""

    case: str
    error: float
    bound: float
    bitwise: bool  # equal to `ulysses` on the same inputs

    @property
    def correct(self) -> bool:
        return self.error <= self.bound


def _shape_BSNH(place: Place, batch: int) -> tuple[int, int, int, int]:
    return batch, TOKENS_A_RANK * place.ranks, HEADS_A_RANK * place.ranks, HEAD_DIM


def every_case(place: Place, backend: str, batch: int, dtype: torch.dtype, kernel: str) -> list[Fact]:
    """Three calls of every case; inputs change and buffers are poisoned before each."""
    group = place.gloo if backend == "gloo" else place.emulated
    wholes = [whole_qkv(_shape_BSNH(place, batch), dtype, seed) for seed in range(3)]
    checks = [error_bound(whole, kernel) for whole in wholes]
    ulysses = SequenceParallelAttention(group, "ulysses", kernel=kernel)
    expected = [ulysses(*(own(place, x) for x in whole)) for whole in wholes]
    facts = []
    for method, plan in CASES:
        attention = SequenceParallelAttention(group, method, plan, kernel)
        if "x" in plan:
            try:
                attention.layer(*(own(place, x) for x in wholes[0]))
            except ValueError as refusal:  # at so few tokens a kernel may round by the number of rows
                if "not be Ulysses' bit for bit" not in str(refusal):
                    raise
                continue
        for seed, (whole, (exact_BSNH, bound)) in enumerate(zip(wholes, checks, strict=True)):
            attention.poison()
            out_BLNH = attention(*(own(place, x) for x in whole))
            assert out_BLNH.dtype == dtype
            error = largest(out_BLNH.double() - own(place, exact_BSNH))
            facts.append(Fact(f"{method} {plan} #{seed}", error, bound, torch.equal(out_BLNH, expected[seed])))
    return facts


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("backend", "kernel", "batch"),
    [("gloo", "sdpa", 1), ("gloo", "sdpa", 2), ("gloo", "math", 2), ("emulated", "sdpa", 2)],
)
def test_against_full_attention(backend: str, kernel: str, ranks: int, batch: int, dtype: torch.dtype) -> None:
    for facts in on_ranks(ranks, every_case, backend, batch, dtype, kernel):
        assert len(facts) % 3 == 0 and 3 * (len(CASES) - len(THIN)) <= len(facts) <= 3 * len(CASES)
        assert [fact for fact in facts if not fact.correct] == []
        if kernel == "sdpa" or dtype == torch.float32:
            # CPU products in half precision choose their algorithm by size: `math` may round one head alone otherwise.
            assert [fact for fact in facts if not fact.bitwise and not fact.case.startswith("ring")] == []


def thin_ends(place: Place, dtype: torch.dtype) -> dict[str, bool]:
    """Whether each thin cut gives Ulysses' bits, at a length at which kernels do not round by the number of rows."""
    shape = (1, 480 * place.ranks, HEADS_A_RANK * place.ranks, 64)
    wholes = [whole_qkv(shape, dtype, seed) for seed in range(2)]
    ulysses = SequenceParallelAttention(place.emulated, "ulysses")
    equal = {}
    for plan in THIN:
        attention = SequenceParallelAttention(place.emulated, "hcms-zero", plan)
        equal[plan] = True
        for whole in wholes:
            inputs = [own(place, x) for x in whole]
            attention.layer(*inputs)
            attention.poison()
            equal[plan] &= torch.equal(attention(*inputs), ulysses(*inputs))
    return equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("ranks", [1, 2])
def test_thin_ends_are_bitwise(ranks: int, dtype: torch.dtype) -> None:
    for equal in on_ranks(ranks, thin_ends, dtype):
        assert equal == dict.fromkeys(THIN, True)


def test_all_methods_are_tested() -> None:
    assert {method for method, _ in CASES} == set(METHODS)


def drawn_case(
    place: Place, cut: list[int], method: str, prefetch: int | None, first: str, batch: int, tokens: int, seed: int
) -> bool:
    whole = whole_qkv((batch, tokens * place.ranks, sum(cut) * place.ranks, 8), torch.float32, seed)
    inputs = [own(place, x) for x in whole]
    plan = "-".join(map(str, cut))
    attention = SequenceParallelAttention(place.gloo, method, plan, prefetch=prefetch, first=first)  # pyright: ignore
    attention.layer(*inputs)  # makes the buffers, so that there is something to poison
    attention.poison()
    return torch.equal(attention(*inputs), SequenceParallelAttention(place.gloo, "ulysses")(*inputs))


@given(
    cut=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    method=st.sampled_from(["hcms-serial", "hcms", "hcms-3lane"]),
    prefetch=st.none() | st.integers(1, 6),
    first=st.sampled_from(["exchange", "return"]),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_any_cut_in_any_order_is_bitwise_ulysses(
    cut: list[int], method: str, prefetch: int | None, first: str, batch: int, tokens: int, seed: int
) -> None:
    assert on_ranks(2, drawn_case, cut, method, prefetch, first, batch, tokens, seed) == [True, True]


# How a model may hand over q, k and v: all hold the same numbers, none is contiguous.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "out of a fused projection": lambda x: torch.stack([x, x + 1, x + 2], dim=2)[:, :, 0],
    "part of a longer head vector": lambda x: torch.cat([x, x + 1], dim=-1)[..., : x.shape[-1]],
    "part of a longer sequence": lambda x: torch.cat([x, x + 1], dim=1)[:, : x.shape[1]],
    "sequence outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second element": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "head dim outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
}


def strided_inputs(place: Place, layout: str, dtype: torch.dtype) -> dict[str, bool]:
    inputs = [own(place, x) for x in whole_qkv(_shape_BSNH(place, 2), dtype)]
    strided = [LAYOUTS[layout](x) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    equal = {}
    for method in METHODS:
        attention = SequenceParallelAttention(place.gloo, method, "1-3-1")
        out_BLNH = attention(*strided)
        expected_BLNH = SequenceParallelAttention(place.gloo, method, "1-3-1")(*inputs)
        equal[method] = torch.equal(out_BLNH, expected_BLNH) and out_BLNH.is_contiguous()
    return equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout: str, dtype: torch.dtype) -> None:
    for equal in on_ranks(2, strided_inputs, layout, dtype):
        assert equal == dict.fromkeys(METHODS, True)


def shared_batch(place: Place) -> dict[str, bool]:
    """One sequence expanded to a batch of three, without memory of its own."""
    inputs = [own(place, x).expand(3, -1, -1, -1) for x in whole_qkv(_shape_BSNH(place, 1), torch.float32)]
    expected_BLNH = SequenceParallelAttention(place.gloo, "ulysses")(*(x.contiguous() for x in inputs))
    return {
        method: torch.allclose(
            SequenceParallelAttention(place.gloo, method, "1-3-1")(*inputs), expected_BLNH, rtol=0, atol=1e-5
        )
        for method in METHODS
    }


def test_expanded_batch() -> None:
    for close in on_ranks(2, shared_batch):
        assert close == dict.fromkeys(METHODS, True)


def alternating(place: Place) -> dict[str, list[bool]]:
    """One object, calls of several shapes and dtypes in turn, in and out of inference mode; earlier results stay."""
    shapes = [(1, 12, 10, 16), (2, 8, 10, 16), (1, 12, 6, 16), (1, 12, 10, 24)]
    calls = [(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)] * 2
    right = {}
    for method in METHODS:
        attention = SequenceParallelAttention(place.gloo, method, "even:2")
        got, bounds, exact, modes = [], [], [], (torch.inference_mode, torch.no_grad, torch.enable_grad)
        for seed, (shape_BSNH, dtype) in enumerate(calls):
            whole = whole_qkv(shape_BSNH, dtype, seed)
            inputs = [own(place, x) for x in whole]
            attention.poison()
            with modes[seed % 3]():
                got.append(attention(*inputs))
            for x in inputs:
                x.fill_(float("nan"))  # the caller's own again: nothing may be read any more
            exact_BSNH, bound = error_bound(whole, "sdpa")
            exact.append(own(place, exact_BSNH))
            bounds.append(bound)
        right[method] = [largest(out.double() - x) <= bound for out, x, bound in zip(got, exact, bounds, strict=True)]
    return right


@pytest.mark.parametrize("ranks", [1, 2])
def test_shapes_alternate_on_one_object(ranks: int) -> None:
    for right in on_ranks(ranks, alternating):
        assert {method for method, calls in right.items() if not all(calls)} == set()


def forty_lengths(place: Place, method: str) -> tuple[list[bool], int, int]:
    """Whether each is right, the most bytes of buffers at any time, and those of the longest alone."""
    attention, right, most = SequenceParallelAttention(place.gloo, method, "1-1"), [], 0
    lengths = [*range(1, 41), *range(1, 41)]
    for tokens in lengths:
        inputs = [own(place, x) for x in whole_qkv((1, tokens * place.ranks, 2 * place.ranks, 8), torch.float32)]
        right.append(torch.equal(attention(*inputs), SequenceParallelAttention(place.gloo, "ulysses")(*inputs)))
        most = max(most, attention.buffer_bytes)
    alone = SequenceParallelAttention(place.gloo, method, "1-1")
    alone(*inputs)
    return right, most, alone.buffer_bytes


@pytest.mark.parametrize("method", ["ulysses", "hcms", "hcms-zero"])
def test_buffers_of_many_lengths_are_bounded(method: str) -> None:
    for right, most, longest in on_ranks(2, forty_lengths, method):
        assert all(right)
        assert longest < most <= SHAPES_KEPT * longest


def refusals(place: Place) -> dict[str, str]:
    """What bad calls are told, on ranks; every rank refuses by itself, so that none is left waiting."""
    x = torch.randn(1, 4, 2 * place.ranks, 8)
    odd = torch.randn(1, 4, 2 * place.ranks + 1, 8)
    told = {}

    def tell(what: str, call: Callable[[], object]) -> None:
        try:
            call()
            told[what] = "accepted"
        except (ValueError, RuntimeError) as error:
            told[what] = f"{type(error).__name__}: {error}"

    def with_plan(plan: str) -> SequenceParallelAttention:
        return SequenceParallelAttention(place.gloo, "hcms", plan)

    attention = with_plan("even:2")
    tell("method", lambda: SequenceParallelAttention(place.gloo, "hmcs"))
    tell("kernel", lambda: SequenceParallelAttention(place.gloo, "hcms", kernel="spda"))
    tell("no lse", lambda: SequenceParallelAttention(place.gloo, "ring", kernel="sage"))
    tell("kernel's device", lambda: SequenceParallelAttention(place.gloo, "hcms", "2", "sdpa-cudnn")(x, x, x))
    tell("heads", lambda: attention(odd, odd, odd))
    tell("chunks", lambda: with_plan("even:3")(x, x, x))
    tell("sum", lambda: with_plan("1-2")(x, x, x))
    tell("form", lambda: with_plan("1+1")(x, x, x))
    tell("prefetch", lambda: SequenceParallelAttention(place.gloo, "hcms", "1-1", prefetch=0)(x, x, x))
    for state in ("cold", "warm"):
        tell(f"gradient, {state}", lambda: attention(x, x, x.clone().requires_grad_()))
        tell(f"shape, {state}", lambda: attention(x, x[:, :3], x[:, :3]))
        tell(f"rank of tensor, {state}", lambda: attention(x[0], x[0], x[0]))
        tell(f"dtype, {state}", lambda: attention(x, x, x.double()))
        with torch.no_grad():
            attention(x, x, x.clone().requires_grad_())  # nothing is recorded here, so nothing is refused
    import_module("torch.testing._internal.distributed.fake_pg")  # registers a backend that is not ours
    other = new_group("fake")
    for method in METHODS:
        tell(f"{method} on another backend", lambda m=method: SequenceParallelAttention(other, m, "1-1")(x, x, x))
    return told


def test_what_bad_calls_are_told() -> None:
    told, others = on_ranks(2, refusals)
    assert told == others
    expected = {
        "method": "ValueError: unknown method 'hmcs': choose one of ulysses, .*hcms-3lane",
        "kernel": "ValueError: unknown kernel 'spda': choose one of sdpa, ",
        "no lse": "ValueError: ring needs a kernel that gives its log-sum-exp; 'sage'",
        "kernel's device": "ValueError: kernel 'sdpa-cudnn' runs on cuda only, not on cpu",
        "heads": "ValueError: 5 heads cannot be divided among 2 ranks",
        "chunks": "ValueError: 3 chunks cannot be cut from 2 heads a rank: choose 1 to 2",
        "sum": "ValueError: cut '1-2' adds up to 3 heads, but a rank has 2",
        "form": r"ValueError: cut '1\+1' is not of the form",
        "prefetch": "ValueError: prefetch must be at least 1 chunk, got 0",
    }
    for state in ("cold", "warm"):
        expected[f"gradient, {state}"] = "ValueError: this attention is forward only"
        expected[f"shape, {state}"] = r"ValueError: q, k and v must share one shape .* \(1, 3, 4, 8\)"
        expected[f"rank of tensor, {state}"] = r"ValueError: q, k and v must share one shape .* \(4, 4, 8\)"
        expected[f"dtype, {state}"] = "ValueError: q, k and v must share dtype and device, .*float64"
    for method in ("hcms", "hcms-3lane", "hcms-zero", "ring"):
        expected[f"{method} on another backend"] = (
            f"RuntimeError: {method} overlaps on gloo, emulated and nccl .*'fake'"
        )
    for method in ("ulysses", "ulysses-packed", "hcms-serial", "ceiling"):
        expected[f"{method} on another backend"] = "accepted"
    assert told.keys() == expected.keys()
    for what, pattern in expected.items():
        with pytest.raises(Exception, match=f"^{pattern}"):  # shows both sides where they differ
            raise RuntimeError(told[what])


def automatic(place: Place, method: str) -> tuple[bool, Schedule | None, str | None, bool]:
    """An automatic plan, chosen at the first call of each of two shapes."""
    attention, equal = SequenceParallelAttention(place.emulated, method), []
    for tokens in (8, 16):
        inputs = [own(place, x) for x in whole_qkv((1, tokens * place.ranks, 3 * place.ranks, 16), torch.float32)]
        expected_BLNH = SequenceParallelAttention(place.emulated, "ulysses")(*inputs)
        equal += [torch.equal(attention(*inputs), expected_BLNH) for _ in range(2)]
    return all(equal), attention.schedule, attention.plan_reason, attention.predicted_ms is not None


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["hcms-serial", "hcms", "hcms-3lane", "hcms-zero"])
def test_an_automatic_plan_is_the_same_on_every_rank(method: str, ranks: int) -> None:
    """And it is that method's, or Ulysses."""
    found = on_ranks(ranks, automatic, method)
    assert [each == found[0] for each in found] == [True] * ranks
    equal, schedule, reason, predicts = found[0]
    assert equal
    assert predicts
    assert schedule is not None
    assert sum(schedule.cut) == 3
    assert reason
    ulysses = {build_schedule(name, "3", 3, ranks).name for name in ("ulysses", "ulysses-packed")}
    own = build_schedule(method, "1-1-1", 3, ranks, on_host=True).name.split("/")[0]
    assert schedule.name in ulysses or schedule.name.split("/")[0] == own


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match=r"no process group: .*init_process_group"):
        SequenceParallelAttention()


def any_group(place: Place) -> list[bool]:
    """Groups as users make them: one without a named backend, and ranks in an order and number of their own."""
    x = torch.randn(1, 4, 4, 8)
    by_device = new_group("cpu:gloo")
    alone = [new_group("gloo", [r]) for r in range(place.ranks)][place.rank]
    return [
        bool(torch.isfinite(SequenceParallelAttention(group, method, "1-1")(x, x, x)).all())
        for group in (by_device, None)
        for method in ("hcms", "ring")
    ] + [SequenceParallelAttention(alone, "hcms", "2-2")(x, x, x).shape == x.shape]


def test_other_groups() -> None:
    assert on_ranks(2, any_group) == [[True] * 5] * 2


def half_of_four(place: Place) -> float | None:
    """A sequence over two of four ranks, neither of them the first: roots and peers are the group's own."""
    group = new_group("gloo", [1, 3])
    if place.rank not in (1, 3):
        return None
    whole = whole_qkv((1, 8, 4, 8), torch.float32)
    exact_BSNH, bound = error_bound(whole, "sdpa")
    mine = slice(0, 4) if place.rank == 1 else slice(4, 8)
    return max(
        largest(SequenceParallelAttention(group, m, "1-1")(*(x[:, mine] for x in whole)) - exact_BSNH[:, mine]) / bound
        for m in METHODS
    )


def test_group_of_some_ranks() -> None:
    ratios = on_ranks(4, half_of_four)
    assert ratios[0] is None
    assert ratios[2] is None
    assert max(ratios[1], ratios[3]) <= 1


@pytest.mark.parametrize(
    ("method", "expected"),
    [("ulysses", "serial-split"), ("ulysses-packed", "serial"), ("ceiling", "serial"), ("ring", "ring")],
)
def test_methods_that_cut_nothing_ignore_the_plan(method: str, expected: str) -> None:
    schedule: Schedule = build_schedule(method, "1-3-1", 5, 2)
    assert schedule.name == expected
    assert schedule.cut == ((1, 1) if method == "ring" else (5,))
