"""What records say of a claim, graded by where they come from; a verdict is that of the best grade there is.

Links that stand in are no several GPUs: what one card shows holds on one card, what an emulated link shows is the
mechanism. A grade never reads from another's records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from hcms.transport import COLLECTIVE
from hcms_lab.report.parts import ONE_OF_MANY, hardware_name
from hcms_lab.report.words import listed, short_hardware

NOT_YET = "not run yet"
UNTOLD = "cannot be told"
NONE = "–"

Read = Callable[[str], list[pd.DataFrame]]
Outcome = Literal["holds", "part", "fails", "untold"]


@dataclass(frozen=True)
class Grade:
    """How near the paper's setting, the higher the nearer, and how outcomes are worded there."""

    rank: int
    holds: str
    part: str
    fails: str

    def verdict(self, outcome: Outcome) -> str:
        """The outcome in this grade's words."""
        return {"holds": self.holds, "part": self.part, "fails": self.fails, "untold": UNTOLD}[outcome]


GPUS = Grade(3, "holds", "in part", "does not hold")
ONE_CARD = Grade(2, "holds on one card", "in part, on one card", "does not hold on one card")
EMULATED = Grade(1, "mechanism shown", "in part, on an ideal link", "not shown on an ideal link")
CPUS = Grade(0, "mechanism shown", "in part, on CPUs", "not shown on CPUs")  # over the host's own exchange


def grade_of(cases: pd.DataFrame) -> Grade:
    """The grade of cases of one hardware and link. Device and backend say what a GPU's link is, not the word native."""
    link = str(cases["link"].iloc[0])
    if link == "emulated":
        return EMULATED
    paths = cases["actual_path"].dropna().astype(str) if "actual_path" in cases else pd.Series(dtype=object)
    over_gloo = any("gloo" in path.split("/") for path in paths)
    if not on_gpu(cases) or (over_gloo and link == "native"):
        return CPUS
    return GPUS if link in ("native", "native-host") else ONE_CARD


def on_gpu(cases: pd.DataFrame) -> bool:
    """Whether a GPU computed: a CPU's slug says that it is one."""
    return not str(cases["hardware"].iloc[0]).startswith("cpu")


@dataclass(frozen=True)
class Evidence:
    """One hardware and link: the outcome by the claim's rule, what was measured, where, and of how many rounds.

    `over` is the link and the transport; `short` is the measured value in a few words, for a table of a row a claim.
    """

    grade: Grade
    outcome: Outcome
    hardware: str
    over: str
    measured: str
    short: str
    on: str
    n: str

    @property
    def verdict(self) -> str:
        return self.grade.verdict(self.outcome)

    @property
    def rested(self) -> bool:
        """Of a GPU: single calls after pauses, at a higher clock than a model's layers find; said where it counts."""
        return self.grade.rank >= ONE_CARD.rank and "rested load" in self.on


@dataclass(frozen=True)
class Finding:
    """All evidence of a claim, the best grade first, with what was predicted.

    `at_most_part` says why the best grade cannot hold yet, where its rule wants more than there is.
    """

    evidence: tuple[Evidence, ...] = ()
    predicted: str = NONE
    at_most_part: str = ""

    @property
    def best(self) -> tuple[Evidence, ...]:
        """The evidence of the best grade that says anything."""
        telling = [e for e in self.evidence if e.outcome != "untold"] or list(self.evidence)
        top = max((e.grade.rank for e in telling), default=0)
        return tuple(e for e in telling if e.grade.rank == top)

    @property
    def outcome(self) -> Outcome:
        """Of the best grade: what all of its hardware says, or in part."""
        outcomes: set[Outcome] = {e.outcome for e in self.best}
        outcome: Outcome = outcomes.pop() if len(outcomes) == 1 else "part"
        return "part" if outcome == "holds" and self.at_most_part else outcome

    @property
    def verdict(self) -> str:
        return self.best[0].grade.verdict(self.outcome) if self.evidence else NOT_YET

    @property
    def wanting(self) -> str:
        """What the rule still wants where all of the best evidence holds, or nothing."""
        holds = bool(self.evidence) and all(e.outcome == "holds" for e in self.best)
        return self.at_most_part if holds else ""

    @property
    def short(self) -> str:
        """The best evidence in a cell, by link: `H100 +36.2 %; H200 +30.1 % (ghost link)`, and so on."""
        if not self.evidence:
            return NOT_YET
        by_link: dict[str, list[str]] = {}
        for e in self.best:
            by_link.setdefault(e.over, []).append(f"{short_hardware(e.hardware)}{', rested,' * e.rested} {e.short}")
        return "; ".join(f"{'; '.join(each)} ({link})" for link, each in by_link.items())


def ordered(evidence: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """The best grade first, then by hardware and link."""
    return tuple(sorted(evidence, key=lambda e: (-e.grade.rank, e.hardware, e.over)))


def by_place(tables: Iterable[pd.DataFrame]) -> list[pd.DataFrame]:
    """The rows of several runs, regrouped: a table for each hardware, link, transport and load, never two in one.

    `name`, the hardware's, is a column.
    """
    named = [table.assign(name=hardware_name(table)) for table in tables if len(table)]
    if not named:
        return []
    whole = pd.concat(named, ignore_index=True)
    whole["transport"] = whole["transport"].fillna(COLLECTIVE) if "transport" in whole else COLLECTIVE
    return [place for _, place in whole.groupby(["hardware", "link", "transport", "load"], dropna=False, sort=False)]


def place(cases: pd.DataFrame) -> str:
    """Where, on how many ranks, over which link at which ratio: the `ratio` that was judged by, or the measured one.

    `cases` are as `by_place` gives them.
    """
    ratios = cases["ratio" if "ratio" in cases else "comm_ratio"].dropna()
    low, high = (f"{x:.2f}" for x in (ratios.min(), ratios.max())) if len(ratios) else ("", "")
    rho = f", ρ = {low}" + (f" to {high}" if low != high else "") if low else ""
    shared = ", ranks share cores" if (cases["ranks_per_core"].fillna(1) > 1).any() else ""
    link = str(cases["link"].iloc[0])
    counts = listed(cases["world_size"])
    ranks = f"one rank of {counts}" if link in ONE_OF_MANY else f"{counts} ranks"
    load = f", {cases['load'].iloc[0]} load" if pd.notna(cases["load"].iloc[0]) else ""
    return f"{cases['name'].iloc[0]}, {ranks}, {over(cases)}{load}{rho}{shared}"


def over(cases: pd.DataFrame) -> str:
    """The link, and what carried our exchanges where that was no collective: `native link, copy-engine`."""
    transport = cases["transport"].iloc[0]
    return f"{cases['link'].iloc[0]} link" + (f", {transport}" if transport != COLLECTIVE else "")


def rounds(cases: pd.DataFrame) -> str:
    """`10`, or `8 to 20`."""
    low, high = int(cases["n"].min()), int(cases["n"].max())
    return str(low) if low == high else f"{low} to {high}"
