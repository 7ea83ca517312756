"""Table 2: is the result bitwise that of Ulysses, by kernel, dtype, ranks and kind of cut (C8)?"""

from __future__ import annotations

import pandas as pd

from hcms_lab.report import parts
from hcms_lab.report.judge_equivalence import chunked
from hcms_lab.report.registry import register

CUTS = {"equal": "equal cuts", "uneven": "uneven cuts", "tapered": "tapered cuts"}


@register("table2", "Is the result bitwise that of Ulysses?")
def table2(records: pd.DataFrame) -> pd.DataFrame:
    """A row a link, kernel, dtype and rank count.

    Cells count the cases (all of our methods and cuts of that kind) and say `bitwise`, or give the largest error;
    `error` is the largest of the whole row, `kernel's own` that of the plain kernel on one rank, both against float64.
    """
    ran = records[records["bitwise_equal"].notna() & (records["source"] == "measured")]
    rows = []
    for (link, kernel, dtype, ranks), cases in ran.groupby(["link", "kernel", "dtype", "world_size"], sort=False):
        ours = cases[cases["method"].isin(chunked())]
        shapes = pd.Series([parts.cut_shape(str(cut)) for cut in ours["cut"]], index=ours.index, dtype=object)
        row: dict[str, object] = {"link": link} if ran["link"].nunique() > 1 else {}
        row |= {"kernel": kernel, "dtype": dtype, "ranks": int(ranks)}  # type: ignore[call-overload]
        row["packed"] = _cell(cases[cases["method"] == "ulysses-packed"])
        row |= {column: _cell(ours[shapes == shape]) for shape, column in CUTS.items()}
        row["ring"] = _cell(cases[cases["method"] == "ring"])
        row["error"] = f"{cases['max_abs_err'].max():.1e}"
        row["kernel's own"] = f"{cases['kernel_max_abs_err'].max():.1e}"
        row["check"] = "ok" if cases["ok"].all() else f"{int((~cases['ok']).sum())} WRONG"
        rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs["caption"] = (
        f"{parts.where(ran)}, {parts.layer(ran, kernel=False)}. Compared with serial Ulysses, bit by bit; where that "
        f"differs, the largest error against float64. Check: every error is within twice the plain kernel's own and "
        f"two roundings. Ring adds up in another order, so it is not expected to be equal."
    )
    return table


def _cell(cases: pd.DataFrame) -> str | None:
    if cases.empty:
        return None
    equal, count = int(cases["bitwise_equal"].sum()), len(cases)
    if equal == count:
        return f"bitwise ({count})"
    error = f"{cases['max_abs_err'].max():.1e}"
    return f"{error} ({equal} of {count} bitwise)" if equal else error
