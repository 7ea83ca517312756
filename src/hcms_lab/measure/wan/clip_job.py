"""What every rank needs to know of a run over whole clips, and who makes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hcms.attention import SequenceParallelAttention
from hcms.clip import ClipShape
from hcms.methods import METHODS
from hcms.transport import COLLECTIVE
from hcms_lab.ground.model_config import ModelConfig
from hcms_lab.measure.cases import Case, Point
from hcms_lab.measure.job import Job

# A result that is not bitwise equal must be this close to the largest latent. A wrong exchange is off by all of it.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class ClipJob:
    """What every rank needs to know of a run.

    Args:
        model: with the run's own steps, guidance and flow_shift.
        source: where pretrained weights come from; None builds random ones.
        job: the micro-benchmarks' job, for the link and for what records repeat.
        points: one a clip length; their cases are the methods.
        clips: the clips' shapes, in the points' order.
        compare_plain: each rank also runs the unchanged pipeline alone, once a length.
        layers_timed: transformer blocks that are built where steps are timed.
    """

    model: ModelConfig
    source: str | None
    job: Job
    points: tuple[Point, ...]
    clips: tuple[ClipShape, ...]
    prompt: str
    negative_prompt: str
    image: str | None
    sharding: str
    vae_tiling: bool
    compare_plain: bool
    layers_timed: int

    @property
    def forwards_a_step(self) -> int:
        return 2 if self.model.guidance > 1 else 1


@dataclass
class Seen:
    """What a method's clips gave on one rank. The lists have an entry a clip, measured or composed."""

    totals_ms: list[float] = field(default_factory=list)
    parts_ms: list[dict[str, float]] = field(default_factory=list)
    steps_ms: list[list[dict[str, float]]] = field(default_factory=list)
    comm_ratio: float | None = None
    latents_equal: bool = True
    frames_equal: bool | None = None
    max_abs_err: float = 0.0
    worst: float = 0.0  # largest error over largest latent
    plain_max_abs_err: float | None = None
    plain_worst: float = 0.0  # of the last latents against the unchanged pipeline, over the largest latent
    plain_bitwise_equal: bool | None = None
    peak_bytes: int = 0
    # Where steps are timed, an entry a step:
    host_ms: list[float] = field(default_factory=list)
    ahead_ms: list[float] = field(default_factory=list)
    sensors: list[dict[str, float]] = field(default_factory=list)
    calls: int = 0  # of the attention in timed steps
    replayed: int = 0
    layer_comm_ratio: float | None = None
    wrong_bytes: int = 0
    wrong: str | None = None  # what else was

    def compare(self, latents: Tensor, expected: Tensor) -> None:
        """Note how latents differ from `ulysses`'s of the same inputs."""
        self.latents_equal &= torch.equal(latents, expected)
        error = largest_error(latents, expected)
        self.max_abs_err = max(self.max_abs_err, error)
        self.worst = max(self.worst, error / expected.abs().max().item())

    def compare_plain(self, latents: Tensor, plain: Tensor) -> None:
        """Note how latents differ from the unchanged pipeline's."""
        self.plain_max_abs_err = largest_error(latents, plain)
        self.plain_worst = self.plain_max_abs_err / plain.abs().max().item()
        self.plain_bitwise_equal = torch.equal(latents, plain)


@dataclass
class Entrant:
    """A method and what its clips gave on this rank."""

    case: Case
    attention: SequenceParallelAttention
    seen: Seen = field(default_factory=Seen)


def entrant(case: Case, point: Point, job: Job) -> Entrant:
    """A method, its buffers still to be made."""
    attention = SequenceParallelAttention(
        None,
        case.method,
        case.cut or "auto",
        point.kernel,
        prefetch=case.prefetch,
        first=case.first,  # pyright: ignore[reportArgumentType]
        profile=job.profile,
        transport=COLLECTIVE if METHODS[case.method].program == "ring" else job.transport,
        graph=job.graph,  # pyright: ignore[reportArgumentType]
    )
    return Entrant(case, attention)


def largest_error(ours: Tensor, theirs: Tensor) -> float:
    """Infinite where it is not finite."""
    error = (ours.double() - theirs.double()).abs().max().item()
    return error if np.isfinite(error) else np.inf
