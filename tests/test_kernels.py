"""Each kernel that runs here against float64, its log-sum-exp too; and what the others say instead of running."""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from hcms.kernels import HALF, KERNELS, attend_full, kernel
from hcms_lab.ground import names
from hcms_lab.measure import cases

pytestmark = pytest.mark.t0

HERE = [name for name, k in KERNELS.items() if k.refusal(torch.float32, 64, "cpu") is None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def qkv(dtype: torch.dtype, *, S: int = 33, T: int = 47, m: int = 3, H: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(S * T + H)
    return [torch.randn(2, length, m, H, generator=generator).to(dtype) for length in (S, T, T)]


def by_numpy(q: Tensor, k: Tensor, v: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Attention and its log-sum-exp from the formula, in float64 and without torch."""
    q_, k_, v_ = (x.double().numpy() for x in (q, k, v))
    scores = np.einsum("bsmh,btmh->bmst", q_, k_) / math.sqrt(q_.shape[-1])
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return np.einsum("bmst,btmh->bsmh", weights / total, v_), (np.log(total) + top)[..., 0]


@pytest.mark.parametrize("block", [1, 7, 33, 512])
def test_the_reference_is_the_formula(block: int) -> None:
    inputs = qkv(torch.float32)
    exact = attend_full(*inputs, block=block)
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact.numpy(), by_numpy(*inputs)[0], rtol=0, atol=1e-14)


def tolerance(dtype: torch.dtype, scale: float) -> float:
    """Some roundings of inputs' and weights' dtype: kernels round scores or weights before the second product."""
    return 4 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    inputs = qkv(dtype)
    exact, exact_lse = by_numpy(*inputs)
    out = kernel(name).attend(*inputs)
    assert out.shape == inputs[0].shape
    assert out.dtype == dtype
    np.testing.assert_allclose(out.double(), exact, rtol=0, atol=tolerance(dtype, 1))
    attend_lse = kernel(name).attend_lse
    assert attend_lse is not None
    same, lse = attend_lse(*inputs)
    assert torch.equal(same, out)
    assert lse.shape == (2, 3, 33)
    assert lse.dtype == torch.float32  # ring merges in float32, whatever the inputs' dtype
    np.testing.assert_allclose(lse.double(), exact_lse, rtol=0, atol=tolerance(dtype, 5))


@pytest.mark.parametrize("name", HERE)
def test_views_as_an_exchange_leaves_them(name: str) -> None:
    """`[S, B, 3, m, H]` of which q, k and v are views, and the same heads first."""
    arrived_SB3mH = torch.randn(40, 2, 3, 5, 16)
    views = [arrived_SB3mH[:, :, t].transpose(0, 1) for t in range(3)]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    expected = kernel(name).attend(*(x.contiguous() for x in views))
    assert torch.equal(kernel(name).attend(*views), expected)
    assert torch.equal(kernel(name).attend(*heads_first), expected)


@pytest.mark.parametrize("name", HERE)
def test_heads_are_independent(name: str) -> None:
    """What lets HCMS cut them: a chunk of heads gives bit for bit what those heads give among all."""
    inputs = qkv(torch.float32, m=5, H=64)
    whole = kernel(name).attend(*inputs)
    for start, stop in ((0, 1), (1, 4), (4, 5)):
        assert torch.equal(kernel(name).attend(*(x[:, :, start:stop] for x in inputs)), whole[:, :, start:stop])


def test_every_kernel_has_its_name() -> None:
    assert set(KERNELS) == {
        *("sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn", "math"),
        *("flash-attn", "flash-attn-3", "sage"),
    }
    assert [name for name, k in KERNELS.items() if not k.gives_lse] == ["sage"]
    assert HERE == ["sdpa", "sdpa-flash", "math"]


def test_configurations_know_the_same_names() -> None:
    """The laboratory writes them out, so that bad input is refused before torch is imported."""
    assert tuple(KERNELS) == names.KERNELS
    assert {getattr(torch, name) for name in cases.DTYPES} == set(DTYPES)


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match=r"unknown kernel 'fa3': choose one of sdpa, sdpa-flash, .*, sage$"):
        kernel("fa3")


@pytest.mark.parametrize("name", ["sdpa-efficient", "sdpa-cudnn", "flash-attn", "flash-attn-3", "sage"])
def test_kernels_of_gpus_are_refused_on_cpu(name: str) -> None:
    assert kernel(name).refusal(torch.bfloat16, 128, "cpu") == f"kernel {name!r} runs on cuda only, not on cpu"


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-3", "sage"])
def test_a_missing_package_is_named(name: str) -> None:
    package = kernel(name).package
    assert package is not None
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    assert kernel(name).refusal(torch.bfloat16, 128, "cuda") == (
        f"kernel {name!r} needs the package {package!r}, which is not installed"
    )


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-cudnn"])
def test_dtypes_and_head_sizes_that_do_not_fit_are_named(name: str) -> None:
    k = kernel(name)
    assert k.refusal(torch.bfloat16, 256, "cuda") is None
    assert k.refusal(torch.float32, 128, "cuda") == f"kernel {name!r} takes float16, bfloat16 on cuda, not float32"
    assert k.refusal(torch.float16, 264, "cuda") == f"kernel {name!r} takes head sizes up to 256 on cuda, not 264"
    assert {torch.float16, torch.bfloat16} == set(HALF)


@pytest.mark.parametrize("name", ["sdpa", "math"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_torch_chooses_itself_fits_everywhere(name: str, dtype: torch.dtype) -> None:
    for device in ("cpu", "cuda"):
        assert kernel(name).refusal(dtype, 512, device) is None


def test_other_devices_are_refused() -> None:
    assert kernel("sdpa").refusal(torch.float32, 64, "mps") == "kernel 'sdpa' runs on cpu and cuda only, not on mps"
