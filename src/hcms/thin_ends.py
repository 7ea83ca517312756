"""Whether a chunk whose rows come in parts keeps its bits, for one kernel: tried, as no kernel promises it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

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
    L, P, H = shape.local_tokens, ranks, shape.head_dim
    generator = torch.Generator(device).manual_seed(0)
    for m, parts in set(zip(schedule.cut, schedule.parts, strict=True)):
        if parts == 1 or parts > L:
            continue
        size = (shape.batch, P * L, m, H)
        token = torch.arange(P * L, device=device) % L  # a token's place among its rank's
        rows = [((L * i // parts <= token) & (token < L * (i + 1) // parts)).nonzero()[:, 0] for i in range(parts)]

        def drawn(size: tuple[int, ...] = size) -> Iterator[Tensor]:
            for _ in "qkv":
                yield torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

        # A rounding that differs shows in few elements of half precision: small layers are drawn more often.
        draws = max(1, _ELEMENTS_TRIED // math.prod(size))
        if not all(rows_stand_alone(kernel, list(drawn()), rows) for _ in range(draws)):
            raise ValueError(
                f"kernel {kernel.name!r} rounds rows of a chunk of {m} heads otherwise in {parts} parts than "
                f"in one, at {P * L} tokens: results would not be Ulysses' bit for bit; choose a cut without parts"
            )
