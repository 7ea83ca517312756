"""One table, three files: Markdown to read, LaTeX to paste, CSV for programs."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from hcms_lab.ground.paths import OUT

TABLES = OUT / "paper_tables"

PAGE_CHARACTERS = 105  # of footnotesize in the width of a page, the space between columns taken off
LONG = 26  # characters from which a column is wrapped in LaTeX

# pdflatex has no glyph for these in its default fonts.
_LATEX = {
    "ρ": r"$\rho$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "−": r"$-$",
    "µ": r"$\mu$",
    "✓": r"$\checkmark$",
    "…": r"\ldots{}",
    "–": "--",
    "·": r"$\cdot$",
}


def write_table(
    name: str,
    table: pd.DataFrame,
    *,
    caption: str = "",
    digits: int = 2,
    folder: Path = TABLES,
    to_paste: bool = True,
) -> list[Path]:
    """Write `<folder>/<name>.md`, `.tex` and `.csv`.

    Args:
        table: rows as they shall appear, the index left out. Floats get `digits` decimals in Markdown and LaTeX and
            stay whole in CSV; what is missing is an en dash.
        caption: a sentence under the Markdown table and the LaTeX caption.
        to_paste: False leaves out all but Markdown.

    Returns the paths. The LaTeX needs the packages `array` and `booktabs` (and `amssymb` for a check mark).
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = table.reset_index(drop=True)
    shown = as_text(table, digits)
    markdown, latex, plain = (folder / f"{name}.{suffix}" for suffix in ("md", "tex", "csv"))
    markdown.write_text(to_markdown(table, digits) + (f"\n{caption}\n" if caption else ""), encoding="utf-8")
    if not to_paste:
        return [markdown]
    styler = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    source = styler.to_latex(
        column_format=_column_format(table, shown),
        hrules=True,
        caption=re.sub(r"([%&#_$])", r"\\\1", caption) or None,
        label=f"tab:{name}",
        position_float="centering",
    )
    source = re.sub(
        r"`([^`\n]+)`", r"\\texttt{\1}", source.replace(r"\centering", "\\centering\\footnotesize\\tabcolsep=4pt")
    )
    for character, command in _LATEX.items():
        source = source.replace(character, command)
    latex.write_text(source, encoding="utf-8")
    table.to_csv(plain, index=False, lineterminator="\n")
    return [markdown, latex, plain]


def as_text(table: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """Every cell as the text that a reader sees; a column of whole numbers with gaps is shown without decimals."""

    def text(value: object, decimals: int) -> str:
        if value is None or value is pd.NA or (isinstance(value, float) and value != value):
            return "–"
        if isinstance(value, bool) or type(value).__name__ == "bool_":
            return "yes" if value else "no"
        return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)

    shown: dict[str, list[str]] = {}
    for column in table.columns:
        values = table[column].tolist()
        whole = all(v.is_integer() for v in values if isinstance(v, float) and v == v)
        shown[str(column)] = [text(v, 0 if whole else digits) for v in values]
    return pd.DataFrame(shown, dtype="object")


def to_markdown(table: pd.DataFrame, digits: int = 2) -> str:
    """The table as GitHub Markdown, a newline at its end."""
    shown = as_text(table, digits).map(lambda cell: cell.replace("|", r"\|"))
    align = ["right" if right else "left" for right in _numeric(table)]
    return shown.to_markdown(index=False, disable_numparse=True, colalign=align if len(shown) else None) + "\n"


def _column_format(table: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Numbers to the right, short text to the left, and long text wrapped so that the table fits the page's width."""
    longest = [max([len(str(column)), *map(len, shown[str(column)])]) for column in table.columns]
    wrapped = [length > LONG and not right for length, right in zip(longest, _numeric(table), strict=True)]
    fixed = sum(length + 2 for length, wraps in zip(longest, wrapped, strict=True) if not wraps)
    # A column of twice the text gets less than twice the width: both then take about as many lines.
    weights = [length**0.5 if wraps else 0.0 for length, wraps in zip(longest, wrapped, strict=True)]
    left = max(PAGE_CHARACTERS - fixed, 11 * sum(wrapped))
    formats = []
    for weight, right in zip(weights, _numeric(table), strict=True):
        share = left * weight / max(sum(weights), 1e-9) / PAGE_CHARACTERS
        formats.append(
            rf">{{\raggedright\arraybackslash}}p{{{share:.2f}\textwidth}}" if weight else "r" if right else "l"
        )
    return "".join(formats)


def _numeric(table: pd.DataFrame) -> list[bool]:
    is_bool = pd.api.types.is_bool_dtype
    return [pd.api.types.is_numeric_dtype(table[c]) and not is_bool(table[c]) for c in table.columns]
