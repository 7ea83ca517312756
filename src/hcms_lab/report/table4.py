"""Table 4: Wan2.2 as numbers: clips measured (figure 7's records), and predicted for the catalogue's GPUs."""

from __future__ import annotations

from typing import Any

import pandas as pd

from hcms.schedule import catalogue
from hcms_lab.ground.load import newest_runs
from hcms_lab.report import parts, style
from hcms_lab.report.claims import claims
from hcms_lab.report.registry import register
from hcms_lab.report.stats import COMPOSED, composed, measured
from hcms_lab.report.words import percent

WHERE = ("hardware", "link", "world_size", "num_frames")
PUT_TOGETHER = "clip, composed"
COLUMNS = (
    "hardware",
    "model",
    "weights",
    "frames",
    "ranks",
    "ρ",
    "method",
    "attention's share",
    "attention, measured",
    "clip, measured",
    PUT_TOGETHER,
    "clip by Amdahl",
    "attention, predicted",
    "clip, predicted",
)


@register("table4", "Wan2.2 as numbers")
def table4(records: pd.DataFrame) -> pd.DataFrame:
    """Gains over Ulysses of attention with its exchanges and of whole clips; measured, composed of measured steps, and
    predicted in columns of their own.

    Args:
        records: table4's own, which are predicted. Measured rows come from the newest records of fig7 on each hardware.
    """
    rows: list[dict[str, object]] = []
    for run in newest_runs("fig7"):
        rows += _measured_rows(composed(measured(run)))
    rows += _predicted_rows(records)
    some_composed = any(PUT_TOGETHER in row for row in rows)
    table = pd.DataFrame(rows, columns=[c for c in COLUMNS if c != PUT_TOGETHER or some_composed])
    paper = claims()
    table.attrs["caption"] = (
        f"Gains over Ulysses, 95 % intervals in brackets; the paper reports {100 * paper['C5'].low:.1f} % for "
        f"attention layers and {100 * paper['C4'].low:.1f} % for the whole pipeline. Share: of attention with its "
        f"exchanges in a clip under Ulysses. Predicted: attention by the cost model, the rest by counting operations "
        f"and bytes; what is assumed is in the records."
    )
    if some_composed:
        table.attrs["caption"] += (
            " Composed: no such clip ran whole; it is put together of timed denoising steps, in which attention was "
            "measured, and of the text encoder and the VAE, measured once each; intervals are of the steps."
        )
    return table


def _with_interval(speedup: float, interval: list[float]) -> str:
    low, high = (percent(float(x) - 1).removesuffix(" %") for x in interval)
    return f"{percent(speedup - 1)} [{low}, {high}]"


def _measured_rows(cases: pd.DataFrame) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for _, point in cases.groupby(
        ["workload", "world_size", "link", "link_ratio", "num_frames", COMPOSED], dropna=False, sort=False
    ):
        base = point[point["method"] == "ulysses"]
        if base.empty:
            continue
        for case in point[point["method"] != "ulysses"].to_dict("records"):
            cut = f", {case['cut']}" if case["cut"] else ""
            rows.append(
                {
                    **_place(case, f"{parts.hardware_name(cases)}, {case['link']} link"),
                    "method": style.label(case["method"]) + cut,
                    "attention's share": f"{100 * float(base['self_attention_share'].iloc[0]):.0f} %",
                    "attention, measured": _with_interval(
                        case["attention_speedup_vs_ulysses"], case["attention_speedup_interval"]
                    ),
                    PUT_TOGETHER if case[COMPOSED] else "clip, measured": _with_interval(
                        case["speedup_vs_ulysses"], case["speedup_interval"]
                    ),
                    "clip by Amdahl": percent(case["amdahl_speedup"] - 1),
                }
            )
    return rows


def _predicted_rows(records: pd.DataFrame) -> list[dict[str, object]]:
    predicted = records[(records["source"] == "predicted") & (records["method"] == "hcms")]
    shares = records[records["method"] == "ulysses"].set_index(list(WHERE))
    known = catalogue.load().gpus
    rows: list[dict[str, object]] = []
    for case in predicted.to_dict("records"):
        name = known[case["hardware"]].name if case["hardware"] in known else case["hardware"]
        share: Any = shares["self_attention_share"][tuple(case[k] for k in WHERE)]
        rows.append(
            {
                **_place(case, f"{name}, {case['link']}"),
                "method": f"{style.label('hcms')}, {case['cut']}",
                "attention's share": f"{100 * float(share):.0f} %",
                "attention, predicted": percent(case["attention_speedup_vs_ulysses"] - 1),
                "clip, predicted": percent(case["speedup_vs_ulysses"] - 1),
            }
        )
    return rows


def _place(case: dict[Any, Any], hardware: str) -> dict[str, object]:
    rho = case["comm_ratio"]
    return {
        "hardware": hardware,
        "model": case["workload"],
        "weights": case["weights"],
        "frames": int(case["num_frames"]),
        "ranks": int(case["world_size"]),
        "ρ": None if pd.isna(rho) else f"{100 * float(rho):.0f} %",
    }
