"""A table of numbers, and how it is written: CSV at full precision, Markdown and LaTeX as read."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lossprune.flags import AUTO
from lossprune.report.layout import TO_A_BUDGET, criterion_order, rows_of
from lossprune.report.settings import FOUND
from lossprune.text_table import markdown_rows

RULE = (
    "The best λ of a criterion and π is the one with the lowest mean validation loss right after "
    "pruning, over seeds, among those λ measured on the most seeds; test data take no part in it."
)
SPREAD = (
    "n counts seeds; std has n − 1 in the denominator; the interval is the 95 % t-interval of the "
    "mean. What is not finite is counted as diverged and left out of the mean."
)
_TWO_SEEDS = " * Two seeds have no interval: these are the lower and the higher of them."
_BUDGET = " Of prunings to a budget the best λ is the one that removes most."
NOTHING = "–"
_TEXT_KINDS = ("text",)


@dataclass(frozen=True)
class Column:
    """A column as it is shown.

    Attributes:
        key: of the frame.
        heading: above it.
        kind: ``text``, ``count``, ``reg`` (a λ), ``chosen`` (a λ in two digits), ``stages`` (a π),
            ``number``, ``change`` (a signed number), ``percent`` (a fraction, shown in percent),
            ``share`` (that with as many digits as it has) or ``points`` (a difference of them).
    """

    key: str
    heading: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table to be written in any format.

    Attributes:
        name: of its files.
        title: one line.
        caption: what was measured, over what, and how λ was chosen.
        columns: shown, in order; rows are grouped by ``network``, which is not among them.
        frame: the numbers at full precision.
        several: whether a ``network`` of it is a dense network at several sparsities.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    frame: pd.DataFrame
    several: bool = False


def frame_of(rows: list[dict[str, Any]], columns: tuple[Column, ...]) -> pd.DataFrame:
    """Return the frame of a table: ``network``, then what its columns show."""
    return pd.DataFrame(rows, columns=["network", *(column.key for column in columns)])


def measures(heading: str, kind: str) -> tuple[Column, ...]:
    """Return the columns of an :class:`lossprune.report.estimates.Estimate`."""
    return (
        Column("n", "n", "count"),
        Column("diverged", "diverged", "count"),
        Column("mean", heading, kind),
        Column("std", "std", kind.replace("change", "number")),
        Column("low", "95 % from", kind),
        Column("high", "to", kind),
    )


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort by network, criterion as the library lists them, π, then as they came."""
    order = {name: place for place, name in enumerate(criterion_order(frame["criterion"]))}
    by = ["network", "criterion", "stages", "schedule", *(["tuning"] if "tuning" in frame else [])]

    def rank(column: pd.Series) -> pd.Series:
        return column.map(order) if column.name == "criterion" else column

    return frame.sort_values(by, key=rank, kind="stable").reset_index(drop=True)


def note_of(frame: pd.DataFrame) -> str:
    """Return what a caption has to add of budgets, and where means are over two seeds."""
    budget = _BUDGET if any(TO_A_BUDGET in name for name in frame["network"]) else ""
    return budget + (_TWO_SEEDS if (frame["n"] == 2).any() else "")


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write a table in all formats and return the files."""
    texts = {"csv": to_csv(table), "md": to_markdown(table), "tex": to_latex(table)}
    files = []
    for suffix, text in texts.items():
        files.append(folder / f"{table.name}.{suffix}")
        files[-1].write_text(text, encoding="utf-8", newline="\n")
    return files


def to_csv(table: Table) -> str:
    """Return the numbers at full precision; fractions stay fractions, nothing stays empty."""
    columns = [column.key for column in table.columns if column.kind in ("reg", "stages")]
    return with_words(table.frame, columns).to_csv(index=False, lineterminator="\n")


def with_words(frame: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Return the frame with the word ``auto`` for λ and π that were found, in these columns."""
    found = [column for column in columns if (frame[column] == FOUND).any()]
    words = {column: frame[column].astype(object).replace(FOUND, AUTO) for column in found}
    return frame.assign(**words)


def to_markdown(table: Table) -> str:
    """Return the table as GitHub renders it, a section per network."""
    lines = [f"# {table.title}", "", table.caption]
    for network, rows in sections(table):
        lines += ["", f"## {network}", ""]
        headings = [column.heading for column in table.columns]
        rule = ["---" if column.kind in _TEXT_KINDS else "---:" for column in table.columns]
        cells = [
            [shown(row, column).replace("|", "\\|") for column in table.columns] for row in rows
        ]
        lines += markdown_rows([headings, rule, *cells])
    if table.frame.empty:
        lines += ["", "Nothing to show yet."]
    return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    """Return a ``table`` environment per network, for the packages booktabs and inputenc (utf8)."""
    parts = ["% \\usepackage{booktabs}"]
    spec = "".join("l" if column.kind in _TEXT_KINDS else "r" for column in table.columns)
    for network, rows in sections(table):
        headings = " & ".join(_latex(column.heading) for column in table.columns)
        body = [
            " & ".join(_latex(shown(row, column)) for column in table.columns) + r" \\"
            for row in rows
        ]
        parts += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(f'{table.title}: {network}. {table.caption}')}}}",
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            headings + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(parts) + "\n"


def sections(table: Table) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Give each network and its rows."""
    for network, rows in table.frame.groupby("network", sort=True):
        yield str(network), rows_of(rows)


def shown(row: dict[str, Any], column: Column) -> str:
    """Return a cell as it is read; in the place of an interval of two seeds, the seeds.

    >>> shown({"std": 0.01234}, Column("std", "std", "percent"))
    '1.23 %'
    >>> two = {"n": 2, "mean": 0.02, "std": 0.01 * math.sqrt(2), "low": math.nan}
    >>> shown(two, Column("low", "95 % from", "percent"))
    '1.00 % *'
    """
    value = row[column.key]
    if column.kind == "text":
        return str(value)
    if column.key in ("low", "high") and "std" in row and row["n"] == 2:
        # std of two is their distance / √2.
        side = -1 if column.key == "low" else 1
        return _number(row, row["mean"] + side * row["std"] / math.sqrt(2), column.kind) + " *"
    if value is None or pd.isna(value):
        return NOTHING
    return _number(row, value, column.kind)


def _number(row: dict[str, Any], value: Any, kind: str) -> str:
    if kind.startswith("difference"):
        points = row["measure"] == "test error"
        sign = "" if kind == "difference_std" else "+"
        return f"{value:{sign}.4f}" if not points else f"{100 * value:{sign}.2f}"
    return _FORMATS[kind](value)


def reg_text(reg: float) -> str:
    """Return a λ in few signs.

    >>> [reg_text(reg) for reg in (0.0, 1e-05, 0.001, 0.1, 1.0, 100.0)]
    ['0', '1e-5', '1e-3', '0.1', '1', '100']
    """
    if reg == FOUND:
        return AUTO
    if reg == 0 or reg >= 0.01:
        return f"{reg:g}"
    mantissa, exponent = f"{reg:e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def stages_text(stages: float) -> str:
    """Return a number of stages, or that it was found.

    >>> stages_text(14), stages_text(FOUND)
    ('14', 'auto')
    """
    return AUTO if stages == FOUND else f"{int(stages)}"


def _finite(form: str) -> Any:
    return lambda value: format(value, form) if math.isfinite(value) else str(value)


_FORMATS: dict[str, Any] = {
    "count": lambda value: f"{int(value)}",
    "reg": reg_text,
    "stages": stages_text,
    "chosen": lambda value: reg_text(float(f"{value:.2g}")),
    "number": _finite(".4f"),
    "change": _finite("+.4f"),
    "percent": lambda value: f"{100 * value:.2f} %",
    "share": lambda value: f"{100 * value:.6g} %",
    "points": lambda value: f"{100 * value:+.2f}",
}

_LATEX = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "π": r"$\pi$", "λ": r"$\lambda$", "Δ": r"$\Delta$", "−": r"$-$", "–": "--", "“": "``",
    "”": "''", "ρ": r"$\rho$",
}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
