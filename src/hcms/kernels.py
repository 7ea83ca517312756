"""Local attention by name. No kernel is changed (C9): each runs as its library ships it, on fewer heads at a time.

Shapes: `q_BSmH`, `k_BTmH`, `v_BTmH` -> `o_BSmH`, softmax scale 1/sqrt(H), no mask, forward only. Inputs may be strided
views with contiguous head vectors. The log-sum-exp, where a kernel gives it, is `lse_BmS` in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AttendLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
HALF = (torch.float16, torch.bfloat16)
_FLASH_MAX_HEAD_DIM = 256


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*_heads_first(q, k, v)).transpose(1, 2)


def _sdpa_by(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return attend


def _flash_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """torch's flash attention with the log-sum-exp that F.scaled_dot_product_attention drops."""
    q, k, v = _heads_first(q, k, v)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2), lse


def _efficient_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_first(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out.transpose(1, 2), lse[..., : q.shape[2]]


def _cudnn_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_first(q, k, v)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def _sdpa_runs(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which kernel plain sdpa gives these inputs to."""
    if q.device.type == "cpu":
        return "sdpa-flash"
    return _SDPA_BY_CHOICE[SDPBackend(torch._fused_sdp_choice(*_heads_first(q, k, v)))]


_SDPA_BY_CHOICE = {
    SDPBackend.CUDNN_ATTENTION: "sdpa-cudnn",
    SDPBackend.FLASH_ATTENTION: "sdpa-flash",
    SDPBackend.EFFICIENT_ATTENTION: "sdpa-efficient",
    SDPBackend.MATH: "math",
}


def _sdpa_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of the very kernel that sdpa would choose: a ring gets what everybody gets."""
    attend_lse = KERNELS[_sdpa_runs(q, k, v)].attend_lse
    assert attend_lse is not None
    return attend_lse(q, k, v)


def _math_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in plain matrix products; the one kernel whose arithmetic is written out here, as a reference."""
    q, k, v = _heads_first(q, k, v)
    scores_BmST = torch.matmul(q, k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    lse_BmS = torch.logsumexp(scores_BmST, dim=-1)
    weights_BmST = torch.exp(scores_BmST - lse_BmS.unsqueeze(-1)).to(v.dtype)
    return torch.matmul(weights_BmST, v).transpose(1, 2), lse_BmS


def _flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(q, k, v)


def _flash_attn_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    return out, lse


def _flash_attn_3_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    out, lse, *_ = flash_attn_func(q, k, v, return_attn_probs=True)
    return out, lse


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _flash_attn_3_lse(q, k, v)[0]


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn  # pyright: ignore[reportMissingImports]

    return sageattn(q, k, v, tensor_layout="NHD")


@dataclass(frozen=True)
class Kernel:
    """A local attention kernel and what it can take.

    Args:
        name: as configurations name it.
        attend: `(q_BSmH, k_BTmH, v_BTmH) -> o_BSmH`.
        attend_lse: the same with `lse_BmS`; None where the kernel gives no log-sum-exp, which Ring Attention needs.
        devices: device types it runs on.
        dtypes: dtypes it takes on GPUs; empty is all floating dtypes, as on CPU.
        max_head_dim: largest head size on GPUs; None is any, as on CPU.
        package: the module to be installed, where it is not torch's own.
        diffusers_backend: its name among diffusers' attention backends; empty where it has none.
    """

    name: str
    attend: Attend
    attend_lse: AttendLse | None
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = ()
    max_head_dim: int | None = None
    package: str | None = None
    diffusers_backend: str = ""

    def runs(self, q_BSmH: Tensor, k_BTmH: Tensor, v_BTmH: Tensor) -> str:
        """The kernel that really runs on these inputs: `sdpa` chooses among others by what it is given."""
        return _sdpa_runs(q_BSmH, k_BTmH, v_BTmH) if self.name == "sdpa" else self.name

    @property
    def gives_lse(self) -> bool:
        return self.attend_lse is not None

    def refusal(self, dtype: torch.dtype, head_dim: int, device: str) -> str | None:
        """Why this kernel cannot run on these inputs, in one line; None if it can."""
        if device not in self.devices:
            return f"kernel {self.name!r} runs on {' and '.join(self.devices)} only, not on {device}"
        if self.package is not None and find_spec(self.package) is None:
            return f"kernel {self.name!r} needs the package {self.package!r}, which is not installed"
        if device == "cpu":
            return None
        if self.dtypes and dtype not in self.dtypes:
            takes = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"kernel {self.name!r} takes {takes} on {device}, not {str(dtype).removeprefix('torch.')}"
        if self.max_head_dim is not None and head_dim > self.max_head_dim:
            return f"kernel {self.name!r} takes head sizes up to {self.max_head_dim} on {device}, not {head_dim}"
        return None


KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (
        Kernel("sdpa", _sdpa, _sdpa_lse, diffusers_backend="native"),
        Kernel(
            "sdpa-flash",
            _sdpa_by(SDPBackend.FLASH_ATTENTION),
            _flash_lse,
            dtypes=HALF,
            max_head_dim=_FLASH_MAX_HEAD_DIM,
            diffusers_backend="_native_flash",
        ),
        Kernel(
            "sdpa-efficient",
            _sdpa_by(SDPBackend.EFFICIENT_ATTENTION),
            _efficient_lse,
            devices=("cuda",),
            diffusers_backend="_native_efficient",
        ),
        Kernel(
            "sdpa-cudnn",
            _sdpa_by(SDPBackend.CUDNN_ATTENTION),
            _cudnn_lse,
            ("cuda",),
            HALF,
            max_head_dim=256,
            diffusers_backend="_native_cudnn",
        ),
        Kernel("math", lambda q, k, v: _math_lse(q, k, v)[0], _math_lse, diffusers_backend="_native_math"),
        Kernel(
            "flash-attn", _flash_attn, _flash_attn_lse, ("cuda",), HALF, 256, "flash_attn", diffusers_backend="flash"
        ),
        Kernel(
            "flash-attn-3",
            _flash_attn_3,
            _flash_attn_3_lse,
            ("cuda",),
            HALF,
            256,
            "flash_attn_interface",
            diffusers_backend="_flash_3",
        ),
        Kernel("sage", _sage, None, ("cuda",), HALF, 128, "sageattention", diffusers_backend="sage"),
    )
}


def kernel(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        ValueError: no such kernel; the message lists those that there are.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}: choose one of {', '.join(KERNELS)}")
    return KERNELS[name]


def rows_stand_alone(kernel: Kernel, qkv: list[Tensor], rows: list[Tensor]) -> bool:
    """Whether a kernel gives each of these sets of query rows the same bits alone as among all rows.

    No kernel promises it: one that chooses its blocks by the number of rows may round otherwise. So it is tried, on the
    very sizes that are asked for.
    """
    q_BSmH, k_BTmH, v_BTmH = qkv
    whole = kernel.attend(q_BSmH, k_BTmH, v_BTmH)
    return all(torch.equal(kernel.attend(q_BSmH[:, some], k_BTmH, v_BTmH), whole[:, some]) for some in rows)


def attend_full(q_BSmH: Tensor, k_BTmH: Tensor, v_BTmH: Tensor, *, block: int = 512) -> Tensor:
    """Full attention in float64, query block by query block: what every method is checked against.

    Returns `o_BSmH` in float64 on the inputs' device.
    """
    q, k, v = (t.transpose(1, 2).double() for t in (q_BSmH, k_BTmH, v_BTmH))
    blocks: list[Any] = []
    for q_block in q.split(block, dim=2):
        scores = torch.matmul(q_block, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        blocks.append(torch.matmul(torch.softmax(scores, dim=-1), v))
    return torch.cat(blocks, dim=2).transpose(1, 2)
