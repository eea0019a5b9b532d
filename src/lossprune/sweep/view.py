"""What a person sees of a sweep: a live table on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lossprune.experiment.folder import RunFolder
from lossprune.sweep.board import Board, describe_outcome, duration
from lossprune.sweep.job import Outcome, RunPhase, last_lines

_REDRAW_SECONDS = 0.5
_LAST = 8  # ended runs that the table shows
_STYLES = {
    RunPhase.FINISHED: "green",
    RunPhase.FAILED: "red",
    RunPhase.DIVERGED: "yellow",
    RunPhase.BLOCKED: "yellow",
}


class SweepLines:
    """A line for each run that ends, on standard error."""

    def begin(self, board: Board) -> None:
        """Print the summary."""
        self.note(board.summary())

    def tick(self, board: Board) -> None:
        """Print nothing."""

    def note(self, text: str) -> None:
        """Print the text."""
        print(text, file=sys.stderr, flush=True)

    def ended(self, label: str, outcome: Outcome, folder: RunFolder, board: Board) -> None:
        """Print ``[3/415] pm=QM pi=14 …: how it went``, and of a failed one its last lines."""
        place = f"[{board.total - board.left}/{board.total}]"
        left = "" if board.eta is None else f" ({duration(board.eta)} left)"
        self.note(f"{place} {label}: {describe_outcome(outcome)}{left}")
        if outcome.status in (RunPhase.FAILED, RunPhase.DIVERGED):
            for line in last_lines(folder):
                self.note(f"    {line}")


class SweepTable:
    """A table redrawn in place: counts, what runs and how far it is, what ended last."""

    def __init__(self, live: Any) -> None:
        self._live = live
        self._last: deque[tuple[str, Outcome]] = deque(maxlen=_LAST)
        self._drawn = 0.0

    def begin(self, board: Board) -> None:
        """Draw it."""
        self._draw(board)

    def tick(self, board: Board) -> None:
        """Draw it anew, if it is time."""
        if time.monotonic() - self._drawn >= _REDRAW_SECONDS or not board.left:
            self._draw(board)

    def note(self, text: str) -> None:
        """Print the text above the table."""
        self._live.console.print(text, highlight=False, markup=False)

    def ended(self, label: str, outcome: Outcome, folder: RunFolder, board: Board) -> None:
        """Put it into the table; a failure is printed above it, with its last lines."""
        self._last.append((label, outcome))
        if outcome.status in (RunPhase.FAILED, RunPhase.DIVERGED):
            self.note(f"{label}: {describe_outcome(outcome)}")
            for line in last_lines(folder):
                self.note(f"    {line}")

    def _draw(self, board: Board) -> None:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        self._drawn = time.monotonic()
        table = Table(box=None, pad_edge=False)
        table.add_column("run", min_width=9)
        table.add_column("", ratio=1)
        for name in ("time", "pruned loss", "valid error"):
            table.add_column(name, justify="right", no_wrap=True)
        for label, outcome in self._last:
            style = _STYLES.get(outcome.status, "")
            table.add_row(Text(outcome.status, style), label, *_cells(outcome))
        for label, job in board.running.items():
            since = duration(time.monotonic() - job.since)
            table.add_row(Text(RunPhase.RUNNING, "cyan"), f"{label}: {progress(job.folder)}", since)
        lines: list[Any] = [Text(board.summary(), "bold"), table]
        if board.best is not None:
            lines.append(Text(f"best so far: {board.best[0]}: {describe_outcome(board.best[1])}"))
        self._live.update(Group(*lines), refresh=True)


View = SweepLines | SweepTable


def _cells(outcome: Outcome) -> list[str]:
    loss, error = outcome.pruned_loss, outcome.valid_error
    return [
        duration(outcome.seconds),
        "" if loss is None else f"{loss:.4f}",
        "" if error is None else f"{error:.2%}",
    ]


def progress(folder: Path) -> str:
    """Return how far a run is, from its record."""
    try:
        record = RunFolder(folder).record()
    except ValueError:
        record = None
    if record is None:
        return "beginning"
    if record.is_pruning:
        return f"pruning stage {len(record.stages)} of {record.config['pi']}"
    return f"epoch {len(record.epochs)} of {record.config['nepochs']}"


@contextmanager
def shown() -> Iterator[View]:
    """Give a live table where standard error is a terminal, else plain lines."""
    if not sys.stderr.isatty():
        yield SweepLines()
        return
    from rich.console import Console
    from rich.live import Live as RichLive

    with RichLive(console=Console(stderr=True), auto_refresh=False) as live:
        yield SweepTable(live)
