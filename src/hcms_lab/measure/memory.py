"""Peak memory of one call, counted by the allocator: exact on CPU and CUDA alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.profiler import profile  # torch.profiler's own imports torch's compiler, for seconds


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `call` held at once on `device` beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    for nbytes in allocations(call):
        held += nbytes
        peak = max(peak, held)
    return peak


def allocations(call: Callable[[], object]) -> list[int]:
    """Every CPU allocation (positive) and release (negative) of tensors' memory during `call`, in bytes, in order."""
    with profile(profile_memory=True) as profiler:
        result = call()
    del result
    events = profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    in_order = sorted(events, key=lambda event: event.start_ns())
    return [e.nbytes() for e in in_order if e.name() == "[memory]"]  # pyright: ignore[reportAttributeAccessIssue]
