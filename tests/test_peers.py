"""Peers as contestants: right, over the given group, charged by its link; or refused with a reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from time import perf_counter

import pytest
import torch
import torch.distributed as dist

from hcms.attention import SequenceParallelAttention
from hcms.kernels import KERNELS, Kernel
from hcms.links import emulated
from hcms_lab.ground.config import WorkloadConfig
from hcms_lab.ground.errors import UsageError
from hcms_lab.measure.cases import Case, points
from hcms_lab.measure.contestant import Contestant, contestant
from hcms_lab.measure.peer_contestant import Attention
from hcms_lab.measure.peers import PEERS, Entry, peer, register
from made_runs import script
from ranks import Place, error_bound, largest, on_ranks, own, whole_qkv

pytestmark = pytest.mark.t1

ON_CPU = [name for name, entry in PEERS.items() if not entry.gpus_only]
ULYSSES = [name for name in ON_CPU if PEERS[name].kind == "ulysses"]
SHAPE_BLNH = (2, 8, 8, 16)
WIRE_MS = 60.0


@dataclass(frozen=True)
class Fact:
    """What one peer did on one rank."""

    error: float
    bound: float
    bitwise: bool  # equal to our `ulysses`
    stale: bool  # a second call with other inputs gave the first one's result
    wall_ms: float
    sent_bytes: int
    actual_path: str
    version: str | None


def one_peer(place: Place, name: str) -> Fact:
    """Two calls of a peer on a link so slow that going round it would show."""
    B, L, N, H = SHAPE_BLNH
    wholes = [whole_qkv((B, L * place.ranks, N, H), torch.float32, seed) for seed in range(2)]
    exact_BSNH, bound = error_bound(wholes[0], "sdpa")
    shares = [[own(place, x) for x in whole] for whole in wholes]
    its: Contestant = peer(name, "sdpa", place.emulated)
    with torch.inference_mode():
        expected = SequenceParallelAttention(place.emulated, "ulysses")(*shares[0])
        other = its(*shares[1])
        sent_before = emulated.PORT.sent_bytes
        its(*shares[0])
        sent_bytes = emulated.PORT.sent_bytes - sent_before
        emulated.set_link(gbps=sent_bytes / WIRE_MS / 1e6)
        try:
            dist.barrier(place.control)
            began_s = perf_counter()
            out_BLNH = its(*shares[0])
            wall_ms = (perf_counter() - began_s) * 1e3
        finally:
            emulated.set_link()
    return Fact(
        error=largest(out_BLNH.double() - own(place, exact_BSNH)),
        bound=bound,
        bitwise=torch.equal(out_BLNH, expected),
        stale=torch.equal(out_BLNH, other),
        wall_ms=wall_ms,
        sent_bytes=sent_bytes,
        actual_path=its.actual_path,
        version=its.version,
    )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_peer_is_right_and_pays_for_the_link(name: str, ranks: int) -> None:
    entry = PEERS[name]
    if find_spec(entry.package) is None:
        pytest.skip(f"{entry.distribution} is not installed")
    tensor_bytes = 4 * torch.Size(SHAPE_BLNH).numel()
    # Ulysses keeps a rank's own share of four tensors; a ring sends K and V to all others.
    wanted_bytes = (4 * tensor_bytes // ranks if name in ULYSSES else 2 * tensor_bytes) * (ranks - 1)
    for fact in on_ranks(ranks, one_peer, name):
        assert fact.error <= fact.bound
        assert fact.bitwise or name not in ULYSSES
        assert not fact.stale
        assert fact.sent_bytes == wanted_bytes
        assert fact.wall_ms >= WIRE_MS
        assert fact.version == version(entry.distribution)
        assert "emulated" in fact.actual_path and "scaled_dot_product_flash_attention" in fact.actual_path
        assert f"charged {wanted_bytes / 1e6:.3f} MB" in fact.actual_path


def refusals(place: Place) -> dict[str, str]:
    """Why each peer of GPUs cannot take part on this group."""
    found = {}
    for name, entry in PEERS.items():
        if entry.gpus_only:
            try:
                peer(name, "sdpa", place.gloo)
            except (ValueError, ImportError) as error:
                found[name] = str(error)
    return found


def test_peers_of_gpus_are_refused_with_a_reason() -> None:
    (reasons,) = on_ranks(1, refusals)
    assert set(reasons) == {name for name, entry in PEERS.items() if entry.gpus_only}
    for name, reason in reasons.items():
        assert name in reason and ("GPUs over NCCL only" in reason or "not installed" in reason)


def toy(kernel: Kernel, group: dist.ProcessGroup) -> Attention:
    """Ours under another name."""
    return SequenceParallelAttention(group, "ulysses-packed", kernel=kernel.name)


TOY = Entry("toy-ulysses", "ulysses", toy, "torch")


def a_new_peer(place: Place) -> tuple[bool, str | None]:
    """Whether a peer that only this file knows gives what `ulysses` gives, and what its case says of it."""
    register(TOY)
    q, k, v = (own(place, x) for x in whole_qkv((1, 4 * place.ranks, 4, 16), torch.float32, 0))
    with torch.inference_mode():
        case = Case("peer:toy-ulysses", None)
        out_BLNH = contestant(case, "sdpa", place.gloo, None)(q, k, v)
        return torch.equal(out_BLNH, SequenceParallelAttention(place.gloo, "ulysses")(q, k, v)), case.peer_kind


def test_a_peer_takes_one_file() -> None:
    assert on_ranks(2, a_new_peer) == [(True, "ulysses")] * 2


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="a peer named 'diffusers-ulysses' is registered already"):
        register(replace(TOY, name="diffusers-ulysses"))


def test_an_unknown_peer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown peer 'xfuser': choose one of deepspeed-ulysses"):
        peer("xfuser", "sdpa", None)


def test_a_misspelt_peer_is_refused_before_anything_starts() -> None:
    workload = WorkloadConfig(name="tiny", tokens_per_frame=4, heads=2, head_dim=8, dtype="float32")
    cfg = script("microbench").Settings(
        name="t", workload=workload, latent_frames=1, methods=["peer:difusers-ulysses"], device="cpu"
    )
    with pytest.raises(UsageError, match=r"methods=peer:difusers-ulysses: choose one of .*peer:diffusers-ulysses"):
        points(cfg)


def test_every_kernel_has_a_diffusers_backend() -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch", reason="needs the extra: wan")
    known = {backend.value for backend in dispatch.AttentionBackendName}
    named = [kernel.diffusers_backend for kernel in KERNELS.values()]
    assert set(named) <= known and len(set(named)) == len(named)
