"""Tables as text: drawn on a terminal, aligned elsewhere, or as Markdown."""

import sys
from collections.abc import Iterable, Sequence

Row = Sequence[str]


def print_table(
    title: str, columns: Row, rows: Sequence[Row], *, left: int = 1, ruled: int = 0
) -> None:
    """Print a table: drawn on a terminal, plain and aligned elsewhere.

    Args:
        title: above it.
        columns: their headings.
        rows: of cells.
        left: how many columns, the first ones, are aligned to the left; the others to the right.
        ruled: on a terminal, a line after every so many rows; 0: none.
    """
    if not sys.stdout.isatty():
        print("\n".join([title, *aligned([columns, *rows], left=left)]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        justify = "left" if place < left else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for number, row in enumerate(rows, start=1):
        table.add_row(*row, end_section=ruled > 0 and number % ruled == 0)
    Console().print(table)


def aligned(rows: Sequence[Row], *, left: int = 1) -> list[str]:
    """Return a line for each row, with its cells under those of the row before.

    The first ``left`` columns are aligned to the left, the others to the right.

    >>> aligned([["layer", "kept"], ["fc1", "12"], ["output", "3"]])
    ['layer   kept', 'fc1       12', 'output     3']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown_table(columns: Row, rows: Iterable[Row]) -> str:
    """Return the table as Markdown, its first column aligned to the left."""
    rule = ["---"] + ["--:"] * (len(columns) - 1)
    return "\n".join(markdown_rows([columns, rule, *rows])) + "\n"


def markdown_rows(rows: Iterable[Row]) -> list[str]:
    """Return the lines of a table in Markdown; the second row is its rule."""
    return [f"| {' | '.join(row)} |" for row in rows]
