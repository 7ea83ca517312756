"""The look of every figure: one fixed, colour-blind-safe colour a method, column widths, hatching for predictions.

    with style.use():
        fig, axes = plt.subplots(figsize=style.size("column"))
        axes.bar(x, predicted_ms, color=style.colour("hcms"), **style.PREDICTED)
    style.save(fig, "fig3", alt="Latency by sequence length: hcms is below ulysses at every length.")

Colours are those of Okabe and Ito (2008); a method also keeps its own marker and dash, so that a figure printed in
grey or seen by a colour-blind reader says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hcms.methods import METHODS
from hcms_lab.ground.paths import OUT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN_IN = 3.5  # one column of a two-column paper
PAGE_IN = 7.16  # both columns

_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILION, _PINK, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"

# What an operation does, in timelines and breakdowns.
KIND_COLOURS = {"exchange": _ORANGE, "attend": _BLUE, "return": _GREEN, "rotate": _PINK, "other": _SKY}

PREDICTED: dict[str, Any] = {"hatch": "////", "edgecolor": "white", "linewidth": 0.0}  # for bars and areas
PREDICTED_LINE: dict[str, Any] = {"linestyle": ":", "markerfacecolor": "none"}
PAPER_BAND: dict[str, Any] = {"color": "#BBBBBB", "alpha": 0.35, "linewidth": 0}

RC: dict[str, Any] = {
    "font.size": 8,
    "text.parse_math": False,  # records name what they like
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "errorbar.capsize": 2,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 220,
    "pdf.fonttype": 42,  # text stays text: searchable, and accepted by venues that refuse Type 3 fonts
    "svg.hashsalt": "hcms",
}


@contextmanager
def use() -> Iterator[None]:
    """The house style for the figures made inside; what was set before comes back afterwards."""
    import matplotlib as mpl
    import seaborn as sns

    with mpl.rc_context(), sns.axes_style("ticks", rc=RC):
        mpl.rcParams.update(RC)  # type: ignore[arg-type]
        yield


def size(width: Literal["column", "page"] = "column", ratio: float = 0.66) -> tuple[float, float]:
    """Width and height in inches: one column or the whole page, height = `ratio` × width."""
    width_in = COLUMN_IN if width == "column" else PAGE_IN
    return width_in, width_in * ratio


def colour(method: str) -> str:
    """The method's fixed colour; a method outside the fixed names (a peer) is pink."""
    return METHODS[method].colour if method in METHODS else _PINK


def marker(method: str) -> str:
    """The method's fixed marker; a peer has a cross."""
    return METHODS[method].marker if method in METHODS else "X"


def label(method: str) -> str:
    """The method's name as legends print it."""
    return METHODS[method].label if method in METHODS else method


def in_order(methods: Iterable[str]) -> list[str]:
    """Each method once, the fixed names in their fixed order and others after them."""
    present = list(dict.fromkeys(methods))
    return [m for m in METHODS if m in present] + sorted(m for m in present if m not in METHODS)


def hardware_colours(hardware: Iterable[str]) -> dict[str, str]:
    """A colour for each hardware type, in the order given."""
    cycle = (_BLUE, _VERMILION, _GREEN, _PINK, _ORANGE, _SKY, _BLACK, _GREY)
    return {name: cycle[i % len(cycle)] for i, name in enumerate(dict.fromkeys(hardware))}


def save(fig: Figure, name: str, *, alt: str = "", folder: Path = OUT / "figures", vector: bool = True) -> list[Path]:
    """Write `<name>.pdf` and `<name>.png` into `folder`, and close the figure.

    Args:
        vector: False leaves the PDF out.
        alt: one or two sentences that say what the figure shows. They travel inside the files (PDF subject, PNG
            description), where the page finds them for readers who cannot see the picture.

    Returns the paths. No date is written, so the same records give the same bytes.
    """
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, dict[str, Any]] = {
        "pdf": {"CreationDate": None, "Title": name, "Subject": alt},
        "png": {"Title": name, "Description": alt},
    }
    written = []
    with use():  # resolution and font embedding are read when a picture is made
        for kind in ("pdf", "png") if vector else ("png",):
            picture = BytesIO()  # a disk that fills up under Matplotlib's writers ends in an error of their own
            fig.savefig(picture, format=kind, metadata=told[kind])
            path, whole = folder / f"{name}.{kind}", folder / f".{name}.{kind}"
            try:
                whole.write_bytes(picture.getvalue())
                whole.replace(path)
            finally:
                whole.unlink(missing_ok=True)
            written.append(path)
    plt.close(fig)
    return written
