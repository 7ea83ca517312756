"""The ghost wire's bytes moved by SMs: a kernel of a few blocks on mapped host memory, as NCCL's are."""

# Triton comes with torch's CUDA builds, without stubs.
# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch
    triton = None

BLOCKS = 16  # half of them each way: more than a card's PCIe needs
_WORDS_A_TURN = 4096  # of a block: 32 kB under way
_WARPS = 16

if triton is not None:

    @triton.jit
    def _both_ways(out_to, out_from, out_words, in_to, in_from, in_words, WORDS: tl.constexpr):
        half = tl.num_programs(0) // 2
        turn = tl.program_id(0) % half
        if tl.program_id(0) < half:
            for start in range(turn * WORDS, out_words, half * WORDS):
                at = start + tl.arange(0, WORDS)
                tl.store(out_to + at, tl.load(out_from + at, mask=at < out_words), mask=at < out_words)
        else:
            for start in range(turn * WORDS, in_words, half * WORDS):
                at = start + tl.arange(0, WORDS)
                tl.store(in_to + at, tl.load(in_from + at, mask=at < in_words), mask=at < in_words)


def move(out: tuple[Tensor, Tensor] | None, into: tuple[Tensor, Tensor] | None) -> None:
    """Copy both ways at once, by one kernel on the current stream.

    Args:
        out, into: `(target, source)`, flat bytes of one length, one on the card and one in pinned memory; None where
            nothing goes that way.

    Raises:
        RuntimeError: there is no Triton.
        ValueError: lengths that are no multiple of 8 bytes.
    """
    if triton is None:
        raise RuntimeError("link.kind=ghost-sm needs Triton, which torch's CUDA builds bring")
    given: list[Any] = []
    ways = [pair for pair in (out, into) if pair is not None]
    for pair in (out, into):
        target, source = pair if pair is not None else ways[0]  # of which nothing is moved
        if target.nbytes % 8:
            raise ValueError(f"ghost-sm moves multiples of 8 bytes, not {target.nbytes}")
        given += [target.view(torch.int64), source.view(torch.int64), target.nbytes // 8 if pair else 0]
    kernel: Any = _both_ways
    kernel[(BLOCKS,)](*given, WORDS=_WORDS_A_TURN, num_warps=_WARPS)
