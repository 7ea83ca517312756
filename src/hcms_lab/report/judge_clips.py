"""C4 and C5: whole clips of Wan2.2, and the attention in them."""

from __future__ import annotations

import pandas as pd

from hcms_lab.report import predictions
from hcms_lab.report.claims import Claim
from hcms_lab.report.evidence import (
    EMULATED,
    Evidence,
    Finding,
    Outcome,
    Read,
    by_place,
    grade_of,
    ordered,
    over,
    place,
)
from hcms_lab.report.stats import COMPOSED, Interval, composed, fixed_cuts, measured
from hcms_lab.report.words import gain, percent

METHODS = ("hcms-zero", "hcms")  # what is judged: the first that ran; the last, the paper's, is said beside it
ON_PAPER = 4  # ranks
LEAST_CLIPS = 8
FULL_WIDTH = 3072  # heads times head size from which on a model counts as one of Wan2.2's


def of_clips(ratio: str, interval: str, claim: Claim, read: Read) -> Finding:
    """A column of the records of whole clips, at the row that was fixed beforehand.

    That row: `hcms-zero` where it ran (on GPUs), else `hcms`, with the first fixed cut that the experiment lists, the
    longest clip, the rank count nearest to 4. It is not the best of anything. Clips that were composed of timed steps
    are evidence of their own, and said to be.
    """
    tables = [composed(measured(fixed_cuts(table))) for table in read(claim.experiment)]
    tables = [table[table["method"].isin(METHODS) & table[ratio].notna()] for table in tables if ratio in table]
    evidence = []
    for cases in (same for at in by_place(tables) for _, same in at.groupby(COMPOSED, sort=False)):
        nearest = min(cases["world_size"], key=lambda ranks: (abs(int(ranks) - ON_PAPER), -int(ranks)))
        cases = cases[cases["world_size"] == nearest]
        cases = cases[cases["num_frames"] == cases["num_frames"].max()]
        ran = [
            (method, cases[cases["method"] == method].iloc[0]) for method in METHODS if method in set(cases["method"])
        ]
        case = ran[0][1]
        low, high = case[interval]
        value = Interval(float(case[ratio]), float(low), float(high), int(case["n"]))
        full_size = int(case["head_dim"]) * int(case["heads"]) >= FULL_WIDTH
        of = "clips"
        on = f"{place(cases)}, {case['workload']}, {int(case['num_frames'])} frames, {ran[0][0]} {case['cut']}"
        if case[COMPOSED]:
            of = "steps"
            on += f", composed of steps of {int(case['layers_timed'])} of {int(case['layers'])} layers"
        grade = grade_of(cases)
        evidence.append(
            Evidence(
                grade if full_size or grade.rank < EMULATED.rank else EMULATED,
                _outcome(value, claim.low),
                str(case["name"]),
                over(cases),
                gain(value) if value.n >= LEAST_CLIPS else f"{gain(value)}, of fewer than {LEAST_CLIPS} {of}",
                ", ".join(f"{method} {percent(float(row[ratio]) - 1)}" for method, row in ran),
                on,
                str(value.n),
            )
        )
    return Finding(ordered(evidence), predictions.clip_gains(ratio, read))


def _outcome(value: Interval, low: float) -> Outcome:
    if value.n < LEAST_CLIPS or pd.isna(value.low):
        return "untold"
    if value.low <= 1:
        return "fails"
    return "holds" if value.high - 1 >= low else "part"
