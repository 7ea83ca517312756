"""Table 3: HCMS's gain for each kernel that ran, and what the catalogue predicts for the others (C9)."""

from __future__ import annotations

import pandas as pd

from hcms.schedule import catalogue
from hcms.schedule.advice import advise
from hcms.schedule.cost import Workload
from hcms_lab.ground.names import KERNELS
from hcms_lab.report import parts
from hcms_lab.report.judge_latency import beyond_overlap
from hcms_lab.report.registry import register
from hcms_lab.report.stats import Interval, gains, measured, overlapping
from hcms_lab.report.words import gain, percent

PREDICTED_FOR = Workload(seq_len=32_400, heads=40, ranks=4)  # 33 frames of 720p on 4 GPUs
COLUMNS = (
    "attention, ms",
    "ρ",
    "cut",
    "gain over Ulysses",
    "over packed",
    "bitwise",
    "error",
    "kernel's own",
    "predicted elsewhere",
)


@register("table3", "The gain of HCMS by kernel")
def table3(records: pd.DataFrame) -> pd.DataFrame:
    """A row a kernel and link: measured where it ran, and a column of predictions where it did not."""
    ran = measured(records)
    several = ran["link"].nunique() > 1
    packed = gains(records, "ulysses-packed").set_index(["kernel", "link"])
    best = gains(records, "ulysses")
    rows: list[dict[str, object]] = []
    for kernel in KERNELS:
        of_kernel = best[best["kernel"] == kernel]
        for _, case in of_kernel.iterrows():
            same = ran[(ran["kernel"] == kernel) & (ran["link"] == case["link"])]
            ours = same[same["method"].isin(overlapping())]
            ceiling_ms = same[same["method"] == "ceiling"]["latency_ms"]
            place = (kernel, case["link"])
            rows.append(
                {
                    "kernel": kernel,
                    "link": case["link"],
                    "attention, ms": float(ceiling_ms.iloc[0]) if len(ceiling_ms) else None,
                    "ρ": float(case["comm_ratio"]),
                    "cut": case["cut"] if case["method"] == "hcms" else f"{case['method']} {case['cut']}",
                    "gain over Ulysses": _gain(case),
                    "over packed": _gain(packed.loc[[place]].iloc[0]) if place in packed.index else None,
                    "bitwise": bool(ours["bitwise_equal"].all()),
                    "error": f"{ours['max_abs_err'].max():.1e}",
                    "kernel's own": f"{ours['kernel_max_abs_err'].max():.1e}",
                    "predicted elsewhere": None,
                }
            )
        if of_kernel.empty:
            rows.append({"kernel": kernel, "predicted elsewhere": predicted(kernel)})
    columns = ["kernel", *(["link"] if several else []), *COLUMNS]
    table = pd.DataFrame(rows).reindex(columns=columns)
    table["bitwise"] = table["bitwise"].astype(object).where(table["bitwise"].notna(), None)
    beyond = dict.fromkeys(str(case["kernel"]) for _, case in best.iterrows() if beyond_overlap(case))
    note = (
        f" {', '.join(beyond)}: more than overlap can give at this ρ, since smaller calls are faster." if beyond else ""
    )
    table.attrs["caption"] = (
        f"{parts.where(ran)}, {parts.layer(ran, kernel=False)}, n = {int(ran['n'].min())}; one link for all kernels, "
        f"so a slower kernel has a lower ρ. 95 % intervals in brackets. Predicted: gain over the faster Ulysses on "
        f"{PREDICTED_FOR.ranks} GPUs, {PREDICTED_FOR.seq_len:,} tokens, from the catalogue, for kernels that did not "
        f"run here.{note}"
    )
    return table


def _gain(case: pd.Series) -> str:
    return gain(Interval(case["speedup"], case["speedup_low"], case["speedup_high"], int(case["n"])))


def predicted(kernel: str) -> str | None:
    """The range of predicted gains over the GPUs of the catalogue for which this kernel's rate is known."""
    advices = [
        advise(gpu, PREDICTED_FOR, kernel=kernel, link=link)
        for gpu in catalogue.load().gpus.values()
        for link, wire in gpu.links.items()
        if kernel in gpu.known_kernels and wire.ranks >= PREDICTED_FOR.ranks
    ]
    if not advices:
        return "no published rate"
    low, high = min(advices, key=lambda a: a.gain), max(advices, key=lambda a: a.gain)
    if low is high:
        return f"{percent(low.gain, 0)} ({low.gpu.name})"
    return f"{percent(low.gain, 0)} ({low.gpu.name}) to {percent(high.gain, 0)} ({high.gpu.name})"
