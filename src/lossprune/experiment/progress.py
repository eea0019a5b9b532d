"""What a person sees of a run while it goes: bars on a terminal, plain lines elsewhere.

Everything goes to standard error: standard output stays free for results.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Silent:
    """What a run tells as it goes; this one says nothing."""

    def note(self, text: str) -> None:
        """Say one thing."""

    def advance(self, what: str, done: int, total: int, text: str) -> None:
        """Say that ``done`` of ``total`` are done, such as epochs, and how the last one went."""


class ProgressLines:
    """Plain lines, for logs and pipes."""

    def note(self, text: str) -> None:
        """Print the text."""
        print(text, file=sys.stderr, flush=True)

    def advance(self, what: str, done: int, total: int, text: str) -> None:
        """Print ``epoch 3/200: …``."""
        print(f"{what} {done}/{total}: {text}", file=sys.stderr, flush=True)


class Bars:
    """One bar for each thing counted, redrawn in place."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def note(self, text: str) -> None:
        """Print the text above the bars."""
        self._bars.console.print(text, highlight=False, markup=False)

    def advance(self, what: str, done: int, total: int, text: str) -> None:
        """Move the bar of ``what``."""
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, text="")
        self._bars.update(self._tasks[what], completed=done, text=text)


Progress = Silent | ProgressLines | Bars


@contextmanager
def shown_progress(show: bool = True) -> Iterator[Progress]:
    """Give bars where standard error is a terminal, else plain lines; silence if not ``show``."""
    if not show:
        yield Silent()
        return
    if not sys.stderr.isatty():
        yield ProgressLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    with RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(stderr=True),
    ) as bars:
        yield Bars(bars)
