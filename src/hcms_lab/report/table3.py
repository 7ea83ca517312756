"""Table 3: HCMS's gain for each kernel that ran, and what the catalogue predicts for the others (C9)."""

from __future__ import annotations

import pandas as pd

from hcms.schedule import catalogue
from hcms.schedule.advice import advise
from hcms.schedule.cost import Workload
from hcms_lab.ground.names import KERNELS
from hcms_lab.report import parts
from hcms_lab.report.claims import beyond_overlap, fixed_cuts, gains, percent
from hcms_lab.report.stats import measured, speedups

PREDICTED_FOR = Workload(seq_len=32_400, heads=40, ranks=4)  # 33 frames of 720p on 4 GPUs


def table3(records: pd.DataFrame) -> pd.DataFrame:
    """A row a kernel: measured where it ran, and a column of predictions where it did not."""
    best = gains(records, "ulysses").set_index("kernel")
    ran = measured(records)
    packed = speedups(fixed_cuts(records), "ulysses-packed")
    rows = []
    for kernel in KERNELS:
        row: dict[str, object] = {"kernel": kernel}
        if kernel in best.index:
            case = best.loc[kernel]
            case = case.iloc[0] if isinstance(case, pd.DataFrame) else case
            same = ran[(ran["kernel"] == kernel) & ran["method"].isin(["hcms", "hcms-3lane"])]
            over = packed[(packed["kernel"] == kernel) & (packed["method"] == "hcms") & (packed["cut"] == case["cut"])]
            ceiling = ran[(ran["kernel"] == kernel) & (ran["method"] == "ceiling")]["latency_ms"]
            row |= {
                "attention, ms": float(ceiling.iloc[0]) if len(ceiling) else None,
                "ρ": float(case["comm_ratio"]),
                "cut": case["cut"],
                "gain over Ulysses": _gain(case),
                "over packed": _gain(over.iloc[0]) if len(over) else None,
                "bitwise": bool(same["bitwise_equal"].all()),
                "error": f"{same['max_abs_err'].max():.1e}",
                "kernel's own": f"{same['kernel_max_abs_err'].max():.1e}",
                "predicted elsewhere": None,
            }
        else:
            row["predicted elsewhere"] = predicted(kernel)
        rows.append(row)
    order = [
        "kernel",
        "attention, ms",
        "ρ",
        "cut",
        "gain over Ulysses",
        "over packed",
        "bitwise",
        "error",
        "kernel's own",
    ]
    table = pd.DataFrame(rows).reindex(columns=[*order, "predicted elsewhere"])
    table["bitwise"] = table["bitwise"].astype(object).where(table["bitwise"].notna(), None)
    layer = PREDICTED_FOR
    beyond = [str(case["kernel"]) for _, case in best.reset_index().iterrows() if beyond_overlap(case)]
    note = (
        f" {', '.join(beyond)}: more than overlap can give at this ρ, since smaller calls are faster." if beyond else ""
    )
    table.attrs["caption"] = (
        f"{parts.where(ran)}, {parts.layer(ran, kernel=False)}, n = {int(ran['n'].min())}; one link for all kernels, "
        f"so a slower kernel has a lower ρ. 95 % intervals in brackets. Predicted: gain over the faster Ulysses on "
        f"{layer.ranks} GPUs, {layer.seq_len:,} tokens, from the catalogue, for kernels that did not run here.{note}"
    )
    return table


def _gain(case: pd.Series) -> str:
    value, low, high = (percent(float(case[c]) - 1) for c in ("speedup", "speedup_low", "speedup_high"))
    return f"{value} [{low}, {high}]"


def predicted(kernel: str) -> str | None:
    """The range of predicted gains over the GPUs of the catalogue for which this kernel's rate is known."""
    told = [
        advise(gpu, PREDICTED_FOR, kernel=kernel, link=link)
        for gpu in catalogue.load().gpus.values()
        for link, wire in gpu.links.items()
        if kernel in gpu.known_kernels and wire.ranks >= PREDICTED_FOR.ranks
    ]
    if not told:
        return "no published rate"
    low, high = min(told, key=lambda a: a.gain), max(told, key=lambda a: a.gain)
    if low is high:
        return f"{percent(low.gain, 0)} ({low.gpu.name})"
    return f"{percent(low.gain, 0)} ({low.gpu.name}) to {percent(high.gain, 0)} ({high.gpu.name})"
