"""Every figure and table by the name of its experiment: records in, figure or table out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd

from hcms_lab.report.claims import table1
from hcms_lab.report.fig1 import fig1
from hcms_lab.report.fig2 import fig2
from hcms_lab.report.fig3 import fig3
from hcms_lab.report.fig4 import fig4
from hcms_lab.report.fig5 import fig5
from hcms_lab.report.fig6 import fig6
from hcms_lab.report.fig7 import fig7
from hcms_lab.report.fig8 import fig8
from hcms_lab.report.table2 import table2
from hcms_lab.report.table3 import table3
from hcms_lab.report.table4 import table4
from hcms_lab.report.table5 import table5

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A figure's label (`get_label()`) says in a sentence what it shows.
FIGURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "fig1": fig1,
    "fig2": fig2,
    "fig3": fig3,
    "fig4": fig4,
    "fig5": fig5,
    "fig6": fig6,
    "fig7": fig7,
    "fig8": fig8,
}

# A table's caption is in `attrs["caption"]`. Table 1 reads the records of all experiments itself.
TABLES: dict[str, Callable[..., pd.DataFrame]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
}
