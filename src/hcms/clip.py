"""How many tokens a clip is, and which clips and rank counts would do. Pure Python.

`frames` counts video frames, `latent_frames` those that transformers see: frames = stride · (latent_frames − 1) + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, isqrt, prod
from typing import Any


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def listed(numbers: list[int]) -> str:
    """`[1, 2, 4]` as `1, 2 or 4`."""
    head, last = numbers[:-1], str(numbers[-1])
    return f"{', '.join(map(str, head))} or {last}" if head else last


@dataclass(frozen=True, slots=True)
class Strides:
    """Video pixels and frames a token covers.

    Args:
        temporal: video frames a latent frame (after the first).
        spatial: pixels a latent pixel, on either axis.
        patch: latent (frames, rows, columns) a token.
    """

    temporal: int = 4
    spatial: int = 8
    patch: tuple[int, int, int] = (1, 2, 2)

    @staticmethod
    def of(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Strides:
        """From the arguments that a diffusers transformer and its VAE are built with."""
        patch = tuple(int(p) for p in transformer.get("patch_size", (1, 2, 2)))
        assert len(patch) == 3
        return Strides(int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8)), patch)

    @property
    def row_pixels(self) -> int:
        return self.spatial * self.patch[1]

    @property
    def column_pixels(self) -> int:
        return self.spatial * self.patch[2]


@dataclass(frozen=True, slots=True)
class ClipShape:
    """A clip and the token grid that a transformer sees of it.

    Raises:
        ValueError: frames that are not 4n + 1, or a size that is not whole in patches; says what would do.
    """

    frames: int
    height: int
    width: int
    strides: Strides

    def __post_init__(self) -> None:
        s = self.strides
        if self.frames < 1 or (self.frames - 1) % s.temporal or self.latent_frames % s.patch[0]:
            below = max(0, (self.frames - 1) // s.temporal) * s.temporal + 1
            raise ValueError(
                f"frames={self.frames}: this model makes {s.temporal}n + 1 video frames, "
                f"so {below} or {below + s.temporal} would do"
            )
        for name, pixels, multiple in (
            ("height", self.height, s.row_pixels),
            ("width", self.width, s.column_pixels),
        ):
            if pixels < multiple or pixels % multiple:
                below = max(1, pixels // multiple) * multiple
                raise ValueError(
                    f"{name}={pixels}: this model needs a multiple of {multiple} pixels, "
                    f"so {below} or {below + multiple} would do"
                )

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // self.strides.temporal + 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        s = self.strides
        return (self.latent_frames // s.patch[0], self.height // s.row_pixels, self.width // s.column_pixels)

    @property
    def tokens(self) -> int:
        """S, the sequence length of self-attention."""
        return prod(self.grid)

    def refusal(self, ranks: int) -> str | None:
        """Why `ranks` cannot split this clip's tokens evenly, with clips that they can; None if they can."""
        if self.tokens % ranks == 0:
            return None
        s = self.strides
        time, rows, columns = self.grid
        would_do: list[str] = []
        step = ranks // gcd(ranks, rows * columns)  # latent patches in time must be a multiple of this
        counts = [t for t in (time // step * step, (time // step + 1) * step) if t > 0]
        would_do.append("frames=" + listed([(t * s.patch[0] - 1) * s.temporal + 1 for t in counts]))
        for name, count, other, pixels in (
            ("height", rows, time * columns, s.row_pixels),
            ("width", columns, time * rows, s.column_pixels),
        ):
            step = ranks // gcd(ranks, other)
            near = [n for n in (count // step * step, (count // step + 1) * step) if n > 0]
            would_do.append(f"{name}=" + listed([n * pixels for n in near]))
        return (
            f"{self.frames} frames of {self.width}x{self.height} are {time} x {rows} x {columns} = {self.tokens} "
            f"tokens, which {ranks} ranks do not divide: {', '.join(would_do[:2])}, or {would_do[2]} would do, "
            f"or {listed([d for d in divisors(self.tokens) if d <= 16])} ranks"
        )


def heads_refusal(heads: int, ranks: int, name: str) -> str | None:
    """Why `ranks` cannot share `heads` heads evenly, in one line; None if they can."""
    if heads % ranks == 0:
        return None
    return f"{name} has {heads} attention heads, which {ranks} ranks do not divide: use {listed(divisors(heads))} ranks"


def layer_flops(tokens: int, text_tokens: int, width: int, ffn_width: int) -> dict[str, float]:
    """Operations of one transformer block over the whole sequence, by part (multiply and add are two)."""
    S, T, d = tokens, text_tokens, width
    return {
        "attention": 4.0 * S * S * d,
        "self_projections": 8.0 * S * d * d,
        "cross_attention": 4.0 * S * d * d + 4.0 * T * d * d + 4.0 * S * T * d,
        "feed_forward": 4.0 * S * d * ffn_width,
    }
