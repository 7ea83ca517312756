"""Table 1: the paper's claims against our records. The rules of the verdicts stand in `paper_tables/claims.csv`.

Nothing is typed in: a number is read from records, a verdict follows from its rule, and a claim without records says
so. `short` has a row a claim; the table itself has a row for each piece of evidence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd

from hcms_lab.ground.load import judged_runs
from hcms_lab.report import judge_clips, judge_equivalence, judge_latency, judge_ratio
from hcms_lab.report.claims import Claim, claims
from hcms_lab.report.evidence import NOT_YET, Finding, Read
from hcms_lab.report.registry import register

JUDGES: dict[str, Callable[[Claim, Read], Finding]] = {
    "C1": partial(judge_latency.over_a_baseline, "ulysses"),
    "C2": partial(judge_latency.over_a_baseline, "ring"),
    "C3": judge_latency.on_platforms,
    "C4": partial(judge_clips.of_clips, "speedup_vs_ulysses", "speedup_interval"),
    "C5": partial(judge_clips.of_clips, "attention_speedup_vs_ulysses", "attention_speedup_interval"),
    "C6": judge_ratio.correlation,
    "C7": judge_ratio.thresholds,
    "C8": judge_equivalence.of_uneven_cuts,
    "C9": judge_latency.over_kernels,
}
CAPTION = (
    "Gains are speed ratios less one, with 95 % bootstrap intervals in brackets; the best cut is picked in one half of "
    "the rounds and scored in the other. The rule of each verdict stands in paper_tables/claims.csv. A verdict is that "
    "of the best evidence: several GPUs, then one card (ghost: one rank at full speed over PCIe; shared: several ranks "
    "on one GPU), then an emulated link, whose communication ratio is chosen: mechanism shown."
)


def findings(read: Read = judged_runs) -> dict[str, Finding]:
    """What records say of each claim.

    Args:
        read: gives the records of an experiment, a table each run; `judged_runs` leaves out this machine's own.
    """
    return {claim.name: JUDGES[claim.name](claim, read) for claim in claims().values()}


def short(read: Read = judged_runs) -> pd.DataFrame:
    """A row a claim in four columns: the claim, the paper's figure, our best evidence in a cell, the verdict."""
    by_claim = findings(read)
    rows = [
        {
            "claim": f"{claim.name}: {claim.statement}",
            "paper": claim.paper,
            "ours, best evidence": by_claim[claim.name].short,
            "verdict": by_claim[claim.name].verdict,
        }
        for claim in claims().values()
    ]
    return pd.DataFrame(rows)


@register("table1", "The paper's claims against the records", reads_all=True)
def table1(read: Read = judged_runs) -> pd.DataFrame:
    """A row a piece of evidence, the best first; what belongs to the claim stands in its first row.

    Args:
        read: as `findings`'s.
    """
    rows: list[dict[str, str]] = []
    for name, finding in findings(read).items():
        claim = claims()[name]
        about = {
            "": name,
            "claim": claim.statement,
            "paper": claim.paper,
            "verdict": finding.verdict + (f": {finding.wanting} are wanted" if finding.wanting else ""),
            "ours, predicted": finding.predicted,
            "command": f"`python experiments/run.py +exp={claim.experiment}`",
        }
        pieces = [
            {"ours, measured": e.measured, "on": e.on, "n": e.n, "this says": e.verdict} for e in finding.evidence
        ] or [{"ours, measured": NOT_YET, "on": "–", "n": "–", "this says": "–"}]
        rows += [(about if i == 0 else dict.fromkeys(about, "")) | each for i, each in enumerate(pieces)]
    order = ["", "claim", "paper", "verdict", "ours, measured", "on", "n", "this says", "ours, predicted", "command"]
    table = pd.DataFrame(rows, columns=order)
    table.attrs["caption"] = CAPTION
    return table
