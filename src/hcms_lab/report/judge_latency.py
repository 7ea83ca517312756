"""C1, C2, C3 and C9: gains of attention layers over lengths, platforms and kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from hcms_lab.report import predictions
from hcms_lab.report.claims import Claim
from hcms_lab.report.closed_form import speedup_limit
from hcms_lab.report.evidence import Evidence, Finding, Outcome, Read, by_place, grade_of, ordered, over, place, rounds
from hcms_lab.report.stats import Interval, gains
from hcms_lab.report.words import gain, span

ON_PAPER = 4  # ranks
PAPERS = "hcms"  # the paper's own method
LAYERS = ("fig3", "fig4", "fig8")  # the experiments that time one layer at several points


def over_a_baseline(base: str, claim: Claim, read: Read) -> Finding:
    """C1 and C2: over a baseline on 4 ranks, at every point of figures 3, 4 and 8."""

    def of(methods: Sequence[str] | None = None) -> list[pd.DataFrame]:
        tables = [gains(table, base, methods) for exp in LAYERS for table in read(exp)]
        return by_place(_with_attrs(table[table["world_size"] == ON_PAPER], table) for table in tables)

    alone = _shorts(of([PAPERS]))
    evidence = []
    for cases in of():
        above = cases["speedup_low"] > 1
        if cases["speedup"].median() - 1 >= claim.low and above.all():
            outcome: Outcome = "holds"
        else:
            outcome = "part" if (cases["speedup_high"] - 1 >= claim.low).any() else "fails"
        lengths = " to ".join(dict.fromkeys(f"{int(s):,}" for s in (cases["seq_len"].min(), cases["seq_len"].max())))
        methods = " or ".join(_methods(cases))
        words = f"{_ends(cases)}, median {gain(_median(cases))} over {len(cases)} points, {methods}"
        evidence.append(_evidence(cases, outcome, words, f"{place(cases)}, {lengths} tokens", alone))
    return Finding(ordered(evidence), predictions.layer_gains(base, read))


def on_platforms(claim: Claim, read: Read) -> Finding:
    """C3: every rank count of every hardware, which are counted over all of its runs of the best grade."""
    evidence: list[Evidence] = []
    counted: dict[Evidence, tuple[str, set[int]]] = {}

    def of(methods: Sequence[str] | None = None) -> list[pd.DataFrame]:
        return by_place(gains(table, "ulysses", methods) for exp in ("fig4", "fig3") for table in read(exp))

    alone = _shorts(of([PAPERS]))
    for cases in of():
        above = cases["speedup_low"] - 1 > claim.low
        outcome: Outcome = "holds" if above.all() else "part" if above.any() else "fails"
        least = cases.loc[cases.groupby("world_size")["speedup"].idxmin()].sort_values("world_size")
        words = "; ".join(f"{int(case['world_size'])} ranks: {_gain(case)}" for _, case in least.iterrows())
        item = _evidence(cases, outcome, f"least gain: {words}", place(cases), alone)
        evidence.append(item)
        counted[item] = (str(cases["hardware"].iloc[0]), {int(ranks) for ranks in cases["world_size"]})
    finding = Finding(ordered(evidence), predictions.platforms(read))
    ranks_of: dict[str, set[int]] = {}
    for hardware, ranks in (counted[e] for e in finding.best):
        ranks_of.setdefault(hardware, set()).update(ranks)
    wide = sum(len(ranks) > 1 for ranks in ranks_of.values()) > 1
    return Finding(finding.evidence, finding.predicted, "" if wide else "two hardware types with two rank counts each")


def over_kernels(claim: Claim, read: Read) -> Finding:
    """C9: every kernel that ran."""
    tables = read(claim.experiment)
    wrong = {hardware for table in tables for hardware in table[~table["ok"].fillna(True)]["hardware"]}
    evidence = []
    for cases in by_place(gains(table, "ulysses") for table in tables):
        families = {str(kernel).split("-")[0] for kernel in cases["kernel"]}
        right = cases["hardware"].iloc[0] not in wrong and (cases["speedup_low"] - 1 > claim.low).all()
        outcome: Outcome = "fails" if not right else "holds" if {"flash", "sdpa"} <= families else "part"
        words = "; ".join(
            f"{case['kernel']} {_gain(case)}"
            + (" (more than overlap can give: smaller calls are faster)" if beyond_overlap(case) else "")
            for _, case in cases.sort_values("kernel").iterrows()
        )
        evidence.append(_evidence(cases, outcome, words, place(cases)))
    return Finding(ordered(evidence))


def beyond_overlap(case: pd.Series) -> bool:
    """Whether a gain is surely above what hiding all communication would give, so that another cause has a part."""
    return float(case["speedup_low"]) > speedup_limit(float(case["comm_ratio"]))


def _evidence(
    cases: pd.DataFrame, outcome: Outcome, measured: str, on: str, alone: Mapping[str, str] | None = None
) -> Evidence:
    """Evidence of these cases; where others than the paper's method were picked, its own gains (`alone`) stand beside
    theirs."""
    short = _span(cases)
    if alone is not None and (methods := _methods(cases)) != [PAPERS]:
        beside = f", {PAPERS} {alone[_at(cases)]}" if _at(cases) in alone else ""
        short = f"{' or '.join(methods)} {short}{beside}"
    name, link = str(cases["name"].iloc[0]), over(cases)
    return Evidence(grade_of(cases), outcome, name, link, measured, short, on, rounds(cases))


def _methods(cases: pd.DataFrame) -> list[str]:
    """Who was picked; a cell names two where the halves of the rounds disagree."""
    return list(dict.fromkeys(method for cell in cases["method"] for method in str(cell).split(" or ")))


def _span(cases: pd.DataFrame) -> str:
    return span(cases["speedup"].min() - 1, cases["speedup"].max() - 1)


def _at(cases: pd.DataFrame) -> str:
    return place(cases.assign(comm_ratio=float("nan")))


def _shorts(places: Iterable[pd.DataFrame]) -> dict[str, str]:
    """The least and the greatest gain by place."""
    return {_at(cases): _span(cases) for cases in places}


def _ends(cases: pd.DataFrame) -> str:
    """The least and the greatest gain, with their intervals."""
    by_gain = cases.sort_values("speedup")
    return " to ".join(dict.fromkeys(_gain(by_gain.iloc[i]) for i in (0, -1)))


def _gain(case: pd.Series) -> str:
    return gain(
        Interval(float(case["speedup"]), float(case["speedup_low"]), float(case["speedup_high"]), int(case["n"]))
    )


def _median(cases: pd.DataFrame) -> Interval:
    return Interval(float(cases["speedup"].median()), float("nan"), float("nan"), len(cases))


def _with_attrs(table: pd.DataFrame, like: pd.DataFrame) -> pd.DataFrame:
    table.attrs = dict(like.attrs)
    return table
