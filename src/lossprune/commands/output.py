"""The folder that a command writes, and the tables that it prints."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lossprune.experiment.folder import RECORD, RunFolder
from lossprune.json_text import parse_json

NETWORK, ONNX, TABLE = "network.safetensors", "network.onnx", "table.md"


def check_out(out: Path, format: str, overwrite: bool) -> None:  # noqa: A002
    """Check that a command may write into ``out``, before its work begins.

    A folder that is new or empty will do, and one that the same command wrote where ``overwrite``
    says so.  Nothing else that is there is ever replaced.

    Raises:
        ValueError: it will not do.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    names = sorted(path.name for path in out.iterdir())
    if not names:
        return
    if format_of(out) != format:
        raise ValueError(
            f"--out {out} holds other files ({', '.join(names[:3])}): give a new or empty folder"
        )
    if not overwrite:
        raise ValueError(
            f"--out {out} holds an earlier result: --overwrite replaces it, or give another folder"
        )


def open_out(out: Path) -> RunFolder:
    """Make the folder where it is not there, and take away the record of what it held.

    The record is written last: a folder with one is whole.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: cannot make the folder {out}: {error.strerror}") from error
    return RunFolder(out)


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Return the bytes of a JSON file."""
    return (json.dumps(values, indent=1) + "\n").encode()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, plain and aligned elsewhere.

    The first column is text, the others are numbers.
    """
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    print(title)
    print(plain_table(columns, rows))


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table with its columns aligned.

    >>> print(plain_table(["layer", "kept"], [["fc1", "12"], ["output", "3"]]))
    layer   kept
    fc1       12
    output     3
    """
    table = [columns, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(columns))]
    lines = []
    for first, *rest in table:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as Markdown."""
    rule = ["---"] + ["--:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows)) + "\n"


def format_of(out: Path) -> str | None:
    """Return the format of the record in a folder; None where there is none that can be read."""
    try:
        record = parse_json((out / RECORD).read_text(encoding="utf-8"))
        return record.get("format") if isinstance(record, dict) else None
    except (OSError, ValueError):
        return None
