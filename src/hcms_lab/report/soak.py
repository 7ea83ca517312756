"""A long run's memory, open files and threads, a line a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hcms_lab.ground.soak_samples import SoakSample
from hcms_lab.report import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "rss_mib": "resident memory, MiB",
    "gpu_mib": "GPU memory, MiB",
    "open_files": "open files",
    "threads": "threads",
    "wrong": "wrong outputs",
}


def soak_figure(samples: Sequence[SoakSample]) -> Figure:
    """One panel a quantity, each from zero, so that flat looks flat; GPU memory where there is any."""
    import matplotlib.pyplot as plt

    on_gpu = any(s.gpu_mib for s in samples)
    panels = {name: label for name, label in _PANELS.items() if name != "gpu_mib" or on_gpu}
    with style.use():
        fig, axes = plt.subplots(1, len(panels), figsize=style.size("page", 0.28), sharex=True)
        for ax, (name, label) in zip(axes, panels.items(), strict=True):
            for rank in sorted({s.rank for s in samples}):
                own = [s for s in samples if s.rank == rank]
                ax.plot([s.minute for s in own], [getattr(s, name) for s in own], label=f"rank {rank}")
            ax.set_title(label)
            ax.set_xlabel("minutes")
            top = max(getattr(s, name) for s in samples)
            ax.set_ylim(0, 1.1 * top if top else 1)
        axes[0].legend()
        fig.set_label("What each rank of a long run holds")
    return fig
