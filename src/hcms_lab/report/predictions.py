"""What figure 6's and table 4's records predict for GPUs that are not at hand, in words for Table 1."""

from __future__ import annotations

import pandas as pd

from hcms_lab.report.evidence import NOT_YET, Read
from hcms_lab.report.words import span

WORTH = 0.10  # a gain that the paper would report
ON_PAPER = 4  # ranks


def layers(read: Read) -> pd.DataFrame:
    """Figure 6's predictions: a row a GPU type and length, with `over_ulysses` and `over_ring` as speedups."""
    for table in read("fig6"):
        predicted = table[(table["source"] == "predicted") & table["predicted_ms"].notna()]
        if len(predicted):
            keys = ["hardware", "link", "kernel", "world_size", "seq_len"]
            wide = predicted.pivot_table(index=keys, columns="method", values="predicted_ms").reset_index()
            return wide.assign(over_ulysses=wide["ulysses"] / wide["hcms"], over_ring=wide["ring"] / wide["hcms"])
    return pd.DataFrame()


def layer_gains(base: str, read: Read) -> str:
    """For C1 and C2."""
    predicted = layers(read)
    return NOT_YET if predicted.empty else _over_types(predicted, predicted[f"over_{base}"] - 1)


def platforms(read: Read) -> str:
    """For C3."""
    predicted = layers(read)
    if predicted.empty:
        return NOT_YET
    best = predicted.groupby("hardware")["over_ulysses"].max()
    return f"{int((best - 1 >= WORTH).sum())} of {len(best)} GPU types gain 10 % or more"


def clip_gains(ratio: str, read: Read) -> str:
    """For C4 and C5: Table 4's predictions for whole clips on 4 GPUs, or on as many as there are."""
    for table in read("table4"):
        predicted = table[(table["source"] == "predicted") & (table["method"] == "hcms") & table[ratio].notna()]
        on_paper = predicted["world_size"] == ON_PAPER
        predicted = predicted[on_paper] if on_paper.any() else predicted
        if len(predicted):
            return _over_types(predicted, predicted[ratio].astype(float) - 1)
    return NOT_YET


def _over_types(predicted: pd.DataFrame, gains: pd.Series) -> str:
    types, ranks = predicted["hardware"].nunique(), int(predicted["world_size"].iloc[0])
    return f"{span(gains.min(), gains.max(), 0)} over {types} GPU types, {ranks} ranks"
