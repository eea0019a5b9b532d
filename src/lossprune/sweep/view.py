"""What a person sees of a sweep: a live table on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lossprune.counts import rough_duration
from lossprune.experiment.folder import RunFolder
from lossprune.progress import redraws
from lossprune.pruning.names import listed
from lossprune.sweep.board import Board, describe_outcome, duration
from lossprune.sweep.job import Outcome, RunPhase, last_lines
from lossprune.text_table import without_middle

_REDRAW_SECONDS = 0.5
_SILENT_SECONDS = 30.0  # after which a line tells how far it is
_LAST = 8  # ended runs that the table shows
_LEAST = 16  # signs of a run's label that the table shows, at least
_STYLES = {
    RunPhase.RUNNING: "cyan",
    RunPhase.FINISHED: "green",
    RunPhase.FAILED: "red",
    RunPhase.DIVERGED: "yellow",
    RunPhase.BLOCKED: "yellow",
}


class SweepLines:
    """A line for each change, on standard error; where nothing changes for long, how far it is."""

    def __init__(self) -> None:
        self._said = time.monotonic()
        self._far: list[str] = []

    def begin(self, board: Board) -> None:
        """Print the summary."""
        self.note(board.summary())

    def tick(self, board: Board) -> None:
        """Print how far the running ones are, if that is news and nothing else was for a while."""
        if time.monotonic() - self._said < _SILENT_SECONDS:
            return
        far = [f"{label}: {progress(job.folder)}" for label, job in board.running.items()]
        if far != self._far:
            self._far = far
            self.note(f"{board.summary()}: {listed(far, most=2)}")
        self._said = time.monotonic()

    def note(self, text: str) -> None:
        """Print the text."""
        self._said = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def ended(self, label: str, outcome: Outcome, folder: RunFolder, board: Board) -> None:
        """Print ``[3/415] pm=QM pi=14 …: how it went``, and of a failed one its last lines."""
        place = f"[{board.total - board.left}/{board.total}]"
        known = board.eta is not None and board.left
        left = f" ({rough_duration(board.eta or 0.0)} left)" if known else ""
        self.note(f"{place} {label}: {describe_outcome(outcome)}{left}")
        if outcome.status in (RunPhase.FAILED, RunPhase.DIVERGED):
            for line in last_lines(folder):
                self.note(f"    {line}")


class SweepTable:
    """A table redrawn in place: counts, what runs and how far it is, what ended last.

    It goes when the sweep ends, which is told in a summary.
    """

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
        now = time.monotonic()
        rows = [
            (outcome.status, label, _came(outcome), duration(outcome.seconds))
            for label, outcome in self._last
        ] + [
            (RunPhase.RUNNING, label, progress(job.folder), duration(now - job.since))
            for label, job in board.running.items()
        ]
        others = [max((len(row[place]) for row in rows), default=0) for place in (0, 2, 3)]
        room = max(self._live.console.width - sum(others) - 2 * len(others), _LEAST)
        table = Table.grid(padding=(0, 2), pad_edge=False)
        for name in ("left", "left", "left", "right"):
            table.add_column(justify=name, no_wrap=True, overflow="ellipsis")
        for phase, label, how, seconds in rows:
            style = Text(phase, _STYLES.get(phase, ""))
            table.add_row(style, Text(without_middle(label, room)), Text(how), seconds)
        lines: list[Any] = [Text(board.summary(), "bold"), table]
        if board.best is not None:
            lines.append(Text(board.told_best()))
        self._live.update(Group(*lines), refresh=True)


View = SweepLines | SweepTable


def _came(outcome: Outcome) -> str:
    words = []
    if outcome.pruned_loss is not None:
        words.append(f"pruned to loss {outcome.pruned_loss:.3f}")
    if outcome.valid_error is not None:
        words.append(f"error {outcome.valid_error:.1%}")
    return ", ".join(words)


def progress(folder: Path) -> str:
    """Return how far a run is, from its record."""
    try:
        record = RunFolder(folder).record()
    except ValueError:
        record = None
    if record is None:
        return "beginning"
    if record.is_pruning:
        of = "" if record.stages_in_all is None else f" of {record.stages_in_all}"
        return f"pruning stage {len(record.stages)}{of}"
    return f"epoch {len(record.epochs)} of {record.config['nepochs']}"


@contextmanager
def shown() -> Iterator[View]:
    """Give a live table where standard error is a terminal, else plain lines."""
    if not redraws():
        yield SweepLines()
        return
    from rich.console import Console
    from rich.live import Live as RichLive

    with RichLive(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        yield SweepTable(live)
