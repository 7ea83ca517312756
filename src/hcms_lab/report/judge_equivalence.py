"""C8: uneven chunks give the same bits."""

from __future__ import annotations

import pandas as pd

from hcms.methods import METHODS
from hcms_lab.ground.cuts import recorded_cut
from hcms_lab.report.claims import Claim
from hcms_lab.report.evidence import GPUS, Evidence, Finding, Outcome, Read, by_place, ordered, over
from hcms_lab.report.stats import fixed_cuts
from hcms_lab.report.words import listed


def chunked() -> list[str]:
    """The methods that cut heads into chunks."""
    return [name for name, method in METHODS.items() if method.cuts]


def of_uneven_cuts(claim: Claim, read: Read) -> Finding:
    """Cases whose cut was asked for and is uneven. A link's pace changes no bits, so every link counts in full."""
    tables = []
    for table in read(claim.experiment):
        asked = fixed_cuts(table)
        ours = asked["method"].isin(chunked()) & (asked["source"] == "measured") & (asked["status"] != "refused")
        uneven = [isinstance(cut, str) and len(set(recorded_cut(cut))) > 1 for cut in asked["cut"]]
        kept = asked[ours & pd.Series(uneven, index=asked.index, dtype=bool)]
        kept.attrs = dict(table.attrs)
        tables.append(kept)
    evidence = []
    for cases in by_place(tables):
        equal, right = int(cases["bitwise_equal"].fillna(False).sum()), int(cases["ok"].fillna(False).sum())
        outcome: Outcome = "holds" if equal == len(cases) else "part" if right == len(cases) else "fails"
        name, link = str(cases["name"].iloc[0]), over(cases)
        kernels = ", ".join(sorted(set(cases["kernel"])))
        evidence.append(
            Evidence(
                GPUS,
                outcome,
                name,
                link,
                f"{equal} of {len(cases)} bitwise equal to Ulysses, largest error {cases['max_abs_err'].max():.1e}",
                f"{equal} of {len(cases)} bitwise",
                f"{name}, {listed(cases['world_size'])} ranks, {link} link, {kernels}",
                f"{len(cases)} cases",
            )
        )
    return Finding(ordered(evidence))
