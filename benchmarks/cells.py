"""Long measurements cell by cell: a file holds those that are finished, and none is done twice.

Several processes may fill one file, each its own part of the cells.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.hardware import hardware

Row = dict[str, Any]


class Cells:
    """The finished cells in the file at ``path``; those of one cell share the values of ``key``."""

    def __init__(self, path: Path, command: str, key: Sequence[str]) -> None:
        self.path, self.command, self.key = path, command, tuple(key)

    def rows(self) -> list[Row]:
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def find(self, **values: Any) -> list[Row]:
        return [row for row in self.rows() if values.items() <= row.items()]

    def add(self, rows: Sequence[Row]) -> None:
        """Put ``rows`` in, with the hardware, in the place of what has the same key."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            new = {self._of(row): {**row, "hardware": hardware()} for row in rows}
            kept = {self._of(row): row for row in self.rows()}
            contents = {"command": self.command, "rows": [*(kept | new).values()]}
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(contents, indent=1) + "\n")
            partial.replace(self.path)

    def _of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)


def mean_and_std(values: Sequence[float], digits: int = 2) -> str:
    """Of a sample, such as ``93.21 ± 0.12``."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def print_markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |")
    print(f"| --- {'| --: ' * (len(header) - 1)}|")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def words_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of a flag that takes several values with commas between."""
    return lambda text: [kind(word) for word in text.split(",")]
