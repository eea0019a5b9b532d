"""Tables as text: drawn on a terminal, aligned elsewhere, or as Markdown."""

import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

Row = Sequence[str]
_NAME = 24  # signs that are left of a long name in the first column, at least


@dataclass(frozen=True)
class _Part:
    """A part of a table that fits a terminal: its columns and their widths, with a frame or not."""

    places: Sequence[int]
    widths: Sequence[int]
    framed: bool = False


def print_table(
    title: str,
    columns: Row,
    rows: Sequence[Row],
    *,
    left: int = 1,
    ruled: int = 0,
    spare: Collection[str] = (),
) -> None:
    """Print a table: drawn on a terminal, plain and aligned elsewhere.

    On a terminal no word is broken.  Where the table is too wide for it, the frame goes, then the
    middle of long names in the first column, then columns that can be spared, which is said; or it
    comes in parts, whole, each with the first column.

    Args:
        title: above it.
        columns: their headings.
        rows: of cells.
        left: how many columns, the first ones, are aligned to the left; the others to the right.
        ruled: on a terminal, a line after every so many rows; 0: none.
        spare: the headings of columns that follow from others, or matter least.
    """
    if not sys.stdout.isatty():
        print("\n".join([title, *aligned([columns, *rows], left=left)]))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    print_lines([title])
    parts = _parts(columns, rows, console.width, spare)
    for part in parts:
        table = Table() if part.framed else Table(**_unframed())
        for place, width in zip(part.places, part.widths, strict=True):
            justify = "left" if place < left else "right"
            table.add_column(Text(columns[place]), width=width, justify=justify)
        for number, row in enumerate(rows, start=1):
            cells = zip(part.places, part.widths, strict=True)
            shown = [Text(without_middle(row[place], width)) for place, width in cells]
            table.add_row(*shown, end_section=ruled > 0 and number % ruled == 0)
        if part is not parts[0]:
            print()
        console.print(table)
    left_out = sorted({*range(len(columns))}.difference(*(part.places for part in parts)))
    if left_out:
        print_lines(
            [f"a wider terminal shows {', '.join(columns[place] for place in left_out)}, too"]
        )


def _unframed() -> dict[str, Any]:
    from rich.box import SIMPLE_HEAD

    return {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}


def _parts(columns: Row, rows: Sequence[Row], width: int, spare: Collection[str]) -> list[_Part]:
    from rich.cells import cell_len

    cells = [max(map(cell_len, column), default=0) for column in zip(*rows, strict=True)]
    cells = cells or [0] * len(columns)
    in_one_line = [max(cell_len(head), cell) for head, cell in zip(columns, cells, strict=True)]
    least = [
        max(cell, *map(cell_len, head.split()), 0)
        for head, cell in zip(columns, cells, strict=True)
    ]
    for framed in (True, False):
        for widths in (in_one_line, least):
            around = 3 * len(widths) + 1 if framed else 2 * (len(widths) - 1)
            if sum(widths) + around <= width:
                return [_Part(range(len(widths)), widths, framed)]
    name = max(min(least[0], _NAME), *map(cell_len, columns[0].split()), 0)
    kept = [place for place, head in enumerate(columns) if place == 0 or head not in spare]
    for places in (range(len(columns)), kept):
        room = width - sum(least[place] + 2 for place in places[1:])
        if room >= name:
            return [_part(places, least, width)]
    groups, room = [[]], width - name
    for place in range(1, len(columns)):  # nothing is spared where parts show it all
        if groups[-1] and least[place] + 2 > room:
            groups.append([])
            room = width - name
        groups[-1].append(place)
        room -= least[place] + 2
    return [_part([0, *group], least, width) for group in groups]


def _part(places: Sequence[int], least: Sequence[int], width: int) -> _Part:
    """Give the first column what the others leave of the width, as far as it needs that."""
    others = [least[place] for place in places[1:]]
    return _Part(places, [max(min(least[0], width - sum(others) - 2 * len(others)), 1), *others])


def without_middle(text: str, width: int) -> str:
    """Return a text of at most ``width`` signs, of a longer one both ends.

    >>> without_middle("features.denseblock3.denselayer12.conv1.weight", 24)
    'features.de…conv1.weight'
    """
    if len(text) <= width:
        return text
    end = width // 2
    return f"{text[: width - end - 1]}…{text[len(text) - end :]}"


def print_lines(lines: Iterable[str], file: TextIO | None = None) -> None:
    """Print lines of text; on a terminal a long one goes on below after a word, not within one."""
    out = sys.stdout if file is None else file
    width = shutil.get_terminal_size().columns
    for line in lines:
        print(wrapped(line, width) if out.isatty() else line, file=out)


def wrapped(text: str, width: int) -> str:
    """Return a text with its lines broken between words, as far as there is a place for that.

    >>> print(wrapped("note: units of a could not be followed", 24))
    note: units of a could
    not be followed
    """
    lines = [
        textwrap.fill(line, max(width, 1), break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    ]
    return "\n".join(lines)


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
