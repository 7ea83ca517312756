"""What makes an attention layer impossible, measured or predicted: its sizes, and ranks that cannot share it."""

from __future__ import annotations

from math import gcd
from typing import Any

from hcms.clip import divisors
from hcms.schedule import catalogue
from hcms_lab.ground.checks import as_list, distinct, one_of, plain_name, whole
from hcms_lab.ground.config import WorkloadConfig
from hcms_lab.ground.errors import UsageError

MOST_OF_A_SIZE = 2**16  # heads, head size, batch, ranks: what lies above is a slip, and would only take long to refuse
MOST_FRAMES = 10**9


def check_workload(w: WorkloadConfig) -> None:
    """Refuse a layer without a size, or with one beyond all sense."""
    plain_name("workload.name", w.name, "it stands in records")
    whole("workload.tokens_per_frame", w.tokens_per_frame, high=MOST_FRAMES)
    for name, value in (("heads", w.heads), ("head_dim", w.head_dim), ("batch", w.batch)):
        whole(f"workload.{name}", value, high=MOST_OF_A_SIZE)


def check_heads(heads: int, ranks: int, setting: str = "workload.heads", least_ranks: int = 1) -> None:
    """Refuse ranks that cannot share the heads evenly."""
    if heads % ranks:
        raise UsageError(
            f"ranks={ranks}: {heads} heads cannot be divided among {ranks} ranks; give one of "
            f"{[p for p in divisors(heads) if p >= least_ranks]}, or {setting}={-(-heads // ranks) * ranks}"
        )


def check_tokens(setting: str, frames: int, tokens_per_frame: int, ranks: int) -> None:
    """Refuse ranks that cannot share the tokens of so many latent frames evenly; `setting` is what says how many."""
    tokens = frames * tokens_per_frame
    if tokens % ranks:
        step = ranks // gcd(ranks, tokens_per_frame)
        near = [str(f) for f in (frames // step * step, (frames // step + 1) * step) if f > 0]
        raise UsageError(
            f"{setting}={frames}: {tokens} tokens cannot be divided among {ranks} ranks; "
            f"{setting}={' or '.join(near)} could"
        )


def check_priced(w: WorkloadConfig, ranks: Any, latent_frames: Any) -> None:
    """Refuse a layer that the catalogue's rates do not cover, or ranks that have nothing to exchange or to share.

    Raises:
        UsageError: one line on the first such setting.
    """
    check_workload(w)
    one_of("workload.dtype", w.dtype, catalogue.DTYPES)
    if w.head_dim != catalogue.HEAD_DIM:
        raise UsageError(f"workload.head_dim={w.head_dim}: rates are known for head size {catalogue.HEAD_DIM}")
    advice = "nothing to predict; give at least one"
    distinct("ranks", as_list(ranks), advice)
    distinct("latent_frames", as_list(latent_frames), advice)
    for frames in as_list(latent_frames):
        whole("latent_frames", frames, high=MOST_FRAMES)
    for P in as_list(ranks):
        if whole("ranks", P, high=MOST_OF_A_SIZE) == 1:
            raise UsageError("ranks=1: one GPU has nothing to exchange; give 2 or more")
        check_heads(w.heads, P, least_ranks=2)
        for frames in as_list(latent_frames):
            check_tokens("latent_frames", frames, w.tokens_per_frame, P)


def gpus_of(name: str | None) -> list[catalogue.Gpu]:
    """The GPUs of the catalogue that `gpu=` names.

    Raises:
        UsageError: no name, or one that the catalogue lacks.
    """
    try:
        everything = catalogue.load().gpus
    except ValueError as error:  # an entry that somebody is adding
        raise UsageError(str(error)) from None
    if name == "all":
        return list(everything.values())
    if name is None:
        raise UsageError(f"gpu=null: give all or one of {', '.join(everything)}")
    try:
        return [catalogue.gpu(name)]
    except ValueError as error:
        raise UsageError(f"gpu={name}: {error}, or all") from None
