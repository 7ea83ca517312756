"""Whether a chunk whose rows come in parts keeps its bits, for one kernel: tried, as no kernel promises it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from hcms.kernels import Kernel, rows_stand_alone
from hcms.schedule.schedule import Schedule
from hcms.transport.layout import LayerShape

_ELEMENTS_TRIED = 1 << 17


def refuse_uneven_bits(
    kernel: Kernel, schedule: Schedule, ranks: int, shape: LayerShape, dtype: torch.dtype, device: torch.device
) -> None:
    """Thin ends split a chunk's rows: refuse where this kernel would give them other bits, on all ranks alike.

    Raises:
        ValueError: it would.
    """
    for m, parts in set(zip(schedule.cut, schedule.parts, strict=True)):
        if parts == 1 or parts > shape.local_tokens:
            continue
        tokens = ranks * shape.local_tokens
        size_BSmH = (shape.batch, tokens, m, shape.head_dim)
        if not _keeps_bits(kernel, size_BSmH, shape.local_tokens, parts, dtype, device, _what_a_kernel_goes_by()):
            raise ValueError(
                f"kernel {kernel.name!r} rounds rows of a chunk of {m} heads otherwise in {parts} parts than "
                f"in one, at {tokens} tokens: results would not be Ulysses' bit for bit; choose a cut without parts"
            )


@lru_cache(maxsize=1024)  # a process asks again for every object, cut and method of one layer
def _keeps_bits(
    kernel: Kernel,
    size_BSmH: tuple[int, int, int, int],
    L: int,
    parts: int,
    dtype: torch.dtype,
    device: torch.device,
    goes_by: tuple[Any, ...],  # part of the question, so that a change of it is a new one
) -> bool:
    """Whether L tokens a rank, split into parts, give a chunk of this size the bits that it has whole."""
    generator = torch.Generator(device).manual_seed(0)
    token = torch.arange(size_BSmH[1], device=device) % L  # a token's place among its rank's
    rows = [((L * i // parts <= token) & (token < L * (i + 1) // parts)).nonzero()[:, 0] for i in range(parts)]

    def drawn() -> list[torch.Tensor]:
        options = {"generator": generator, "device": device, "dtype": torch.float32}
        return [torch.randn(size_BSmH, **options).to(dtype) for _ in "qkv"]

    # A rounding that differs shows in few elements of half precision: small layers are drawn more often.
    draws = max(1, _ELEMENTS_TRIED // math.prod(size_BSmH))
    return all(rows_stand_alone(kernel, drawn(), rows) for _ in range(draws))


def _what_a_kernel_goes_by() -> tuple[Any, ...]:
    """What else may change the kernel that runs, or how it rounds, within a process."""
    sdp = torch.backends.cuda
    able = (sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled(), sdp.cudnn_sdp_enabled())
    rounds = (torch.get_float32_matmul_precision(), sdp.matmul.allow_tf32, sdp.fp16_bf16_reduction_math_sdp_allowed())
    on_host = (torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.are_deterministic_algorithms_enabled())
    return (*able, *rounds, *on_host)
