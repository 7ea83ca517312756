"""One W&B workspace and one report for all hardware: panels overlay hardware types, the report adds the claims.

Both are built from the committed records (which hardware there is, what was claimed) and from the keys that
`wandb_mirror` logs. Runs are grouped by `hardware.name`; measured and predicted runs never share a set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hcms_lab.ground.experiments import axis
from hcms_lab.ground.load import committed_folders, environment, hardware_name, records
from hcms_lab.ground.paths import ROOT
from hcms_lab.report import style
from hcms_lab.report.readme import experiments, results
from hcms_lab.report.tables import to_markdown
from hcms_lab.report.wandb_mirror import summary

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

HARDWARE = "hardware.name"
AXIS_LABELS = {"seq_len": "tokens", "world_size": "ranks", "comm_ratio": "communication ratio", "chunks": "chunks"}


@dataclass(frozen=True)
class Curve:
    """A panel: one metric of one method by the experiment's step metric, a line for each hardware."""

    title: str
    metric: str
    method: str
    unit: str

    def key(self, exp: str) -> str:
        """The logged keys, as a regular expression: further words tell kernels or rank counts apart."""
        return f"^{exp}/best/{self.metric}/{self.method}( .*)?$"


_LAYER = (
    Curve("HCMS over Ulysses", "speedup_vs_ulysses", "hcms", "speedup"),
    Curve("HCMS over Ring", "speedup_vs_ring", "hcms", "speedup"),
    Curve("Share of the hideable time hidden", "hidden_fraction", "hcms", "share"),
    Curve("Latency of HCMS", "latency_ms", "hcms", "ms"),
    Curve("Latency of Ulysses", "latency_ms", "ulysses", "ms"),
    Curve("Latency of Ring", "latency_ms", "ring", "ms"),
)
PANELS = {
    "fig3": _LAYER,
    "fig4": _LAYER,
    "fig5": _LAYER,
    "fig7": (
        Curve("Whole pipeline, HCMS over Ulysses", "speedup_vs_ulysses", "hcms", "speedup"),
        Curve("Attention, HCMS over Ulysses", "attention_speedup_vs_ulysses", "hcms", "speedup"),
        Curve("Share of self-attention under Ulysses", "self_attention_share", "ulysses", "share"),
        Curve("Latency of HCMS", "latency_ms", "hcms", "ms"),
        Curve("Latency of Ulysses", "latency_ms", "ulysses", "ms"),
        Curve("Latency of Ring", "latency_ms", "ring", "ms"),
    ),
}


def workspace(entity: str, project: str, name: str, root: Path = ROOT) -> workspaces.Workspace:
    """The saved view: a section an experiment, measured runs only, grouped and coloured by hardware."""
    import wandb_workspaces.workspaces as workspaces

    titles = _titles(root)
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name=titles[exp], panels=_panels(exp), is_open=True, pinned=exp == "fig3")
            for exp in PANELS
        ],
        runset_settings=workspaces.RunsetSettings(
            filters=[workspaces.Config("source") == "measured"],
            groupby=[workspaces.Config(HARDWARE)],
            group_colors={name: colour for name, colour in style.hardware_colours(hardware_names(root)).items()},  # noqa: C416
        ),
    )


def report(entity: str, project: str, name: str, root: Path = ROOT) -> reports.Report:
    """The report: the claims table, then for each experiment what every hardware reached, and the same panels."""
    import wandb_workspaces.reports.v2 as reports

    titles = _titles(root)
    blocks: list[Any] = [
        reports.MarkdownBlock(
            "Generated from the repository's committed records. The runs below are those of this project."
        ),
        reports.H1("Claims"),
        reports.MarkdownBlock(results(root)),
    ]
    for exp in PANELS:
        blocks += [reports.H1(titles[exp]), reports.MarkdownBlock(_headlines(exp, root))]
        # Without entity and project a set takes the report's own, and can be written without asking the server.
        sets = [
            reports.Runset(
                name=source,
                filters=f"Config('source') = '{source}' and Config('exp') = '{exp}'",
                groupby=[f"config.{HARDWARE}"],
            )
            for source in ("measured", "predicted")
        ]
        blocks.append(reports.PanelGrid(runsets=sets, panels=_panels(exp)))
    return reports.Report(entity=entity, project=project, title=name, width="fluid", blocks=blocks)


def as_json(view: Any) -> dict[str, Any]:
    """What `save()` would send for a workspace or a report, as plain data; asks no server."""
    # The library has no public way to write a view without saving it; a golden test watches this one.
    return view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def hardware_names(root: Path = ROOT) -> list[str]:
    """The names of all hardware with committed records of these experiments, in the order of their slugs."""
    named: dict[str, str] = {}
    for exp in PANELS:
        for slug, folder in committed_folders(exp, root).items():
            named[slug] = environment(folder).get("hardware", {}).get("name", slug)
    return [named[slug] for slug in sorted(named)]


def _titles(root: Path) -> dict[str, str]:
    known = {experiment.name: f"{experiment.label}: {experiment.what}" for experiment in experiments(root)}
    return {exp: known.get(exp, exp).rstrip(".") for exp in PANELS}


def _panels(exp: str) -> list[Any]:
    import wandb_workspaces.reports.v2 as reports

    x = axis(exp)
    columns, width, height = 3, 8, 7
    return [
        reports.LinePlot(
            title=curve.title,
            x=x,
            metric_regex=curve.key(exp),
            title_x=AXIS_LABELS[x],
            title_y=curve.unit,
            groupby=reports.Config(HARDWARE),
            groupby_aggfunc="median",
            groupby_rangefunc="minmax",
            smoothing_type="none",
            layout=reports.Layout(x=i % columns * width, y=i // columns * height, w=width, h=height),
        )
        for i, curve in enumerate(PANELS[exp])
    ]


def _headlines(exp: str, root: Path) -> str:
    """What every hardware with committed records reached, measured and predicted in rows of their own."""
    rows = []
    for folder in committed_folders(exp, root).values():
        for source, table in records(folder).groupby("source", sort=True):
            headline = summary(table)
            rows.append(
                {
                    "hardware": hardware_name(folder),
                    "": source,
                    "link": ", ".join(sorted(set(table["link"].dropna()))),
                    "ranks": ", ".join(f"{ranks:g}" for ranks in sorted(table["world_size"].dropna().unique())),
                    "ρ": headline.get("comm_ratio"),
                    "HCMS over Ulysses, best": headline.get("best_speedup_vs_ulysses"),
                    "its cut": headline.get("best_speedup_vs_ulysses_cut"),
                    "over Ring, best": headline.get("best_speedup_vs_ring"),
                    "cases": headline["cases"],
                    "failed": headline["failed"],
                }
            )
    return to_markdown(pd.DataFrame(rows)) if rows else "No committed records yet.\n"
