"""What a person sees of something that takes long: bars on a terminal, plain lines elsewhere.

Everything goes to standard error: standard output stays free for results.  A count that is begun
while another has not come to its end is a part of it, as the examples of a stage are: its bar
stands below, and closing the other closes it as well.
"""

import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from lossprune.counts import WIDE, Counts, bar_lines, of_all

_LINES = 30  # of one count, a line each; from then on one every so often, and the last
_LINE_SECONDS = 2.0
_SILENT_SECONDS = 10.0  # after which a line tells of a count that has nothing else to say
_REDRAWS = 4  # a second


class Progress(Protocol):
    """Who is told as it goes."""

    def note(self, text: str) -> None:
        """Say one thing."""

    def advance(self, what: str, done: int, total: int | None, text: str = "") -> None:
        """Say that ``done`` of ``total`` are done, such as epochs, and how the last one went.

        Args:
            what: the name of one: ``epoch``.
            done: 0: the first has begun.
            total: how many there will be; None: nobody knows yet.
            text: parts with a comma between them, the one that matters most first: where there is
                little space, the last ones are left out.
        """

    def close(self, what: str) -> None:
        """Say that there is nothing more to tell of ``what``, nor of what was begun within it."""


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def advance(self, what: str, done: int, total: int | None, text: str = "") -> None:
        """Say nothing."""

    def close(self, what: str) -> None:
        """Say nothing."""


class Within:
    """Counts of something that is a part of what another is told: how far it is, and no more."""

    def __init__(self, whole: Progress) -> None:
        self._whole = whole
        self.close = whole.close

    def note(self, text: str) -> None:
        """Say nothing."""

    def advance(self, what: str, done: int, total: int | None, text: str = "") -> None:
        """Say how many are done."""
        self._whole.advance(what, done, total)


class ProgressLines:
    """Plain lines, for logs, pipes and notebooks; none before ``after`` seconds have gone by."""

    def __init__(self, after: float = 0.0) -> None:
        self._lines: dict[str, int] = {}
        self._said = time.monotonic()
        self._first = self._said + after

    def note(self, text: str) -> None:
        """Print the text."""
        self._said = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def advance(self, what: str, done: int, total: int | None, text: str = "") -> None:
        """Print ``epoch 3/200: …``, unless there has been a line of it just now."""
        lines, silent = self._lines.get(what, 0), time.monotonic() - self._said
        if text:
            due = lines < _LINES or done == total or silent >= _LINE_SECONDS
        else:
            due = done > 0 and silent >= _SILENT_SECONDS
        if due and time.monotonic() >= self._first:
            self._lines[what] = lines + 1
            self.note(f"{what} {of_all(done, total)}" + (f": {text}" if text else ""))

    def close(self, what: str) -> None:
        """Print nothing."""


class OneLine:
    """One line, written over as it goes, where a notebook's own cell says it; the last one stays.

    Nothing is written before ``after`` seconds have gone by.
    """

    def __init__(self, after: float = 0.0) -> None:
        self._counts = Counts()
        self._next = time.monotonic() + after
        self._width = 0

    def note(self, text: str) -> None:
        """Print the text instead of the line, which goes on below."""
        print(text.ljust(self._width), file=sys.stderr, flush=True)

    def advance(self, what: str, done: int, total: int | None, text: str = "") -> None:
        """Write how far the outermost count is, and what is within it."""
        self._counts.advance(what, done, total, text)
        if time.monotonic() >= self._next:
            self._write()

    def close(self, what: str) -> None:
        """Take it out of the line."""
        self._counts.close(what)

    def end(self) -> None:
        """Leave the line as it is in the end."""
        if self._width:
            self._write("\n")

    def _write(self, end: str = "\r") -> None:  # so that what others write is written over it
        now = time.monotonic()
        self._next = now + 1 / _REDRAWS
        outer, *others = self._counts.values()
        within = [f"{count.what} {count.told}" for count in others]
        line = ", ".join([*bar_lines([outer], WIDE, now), *within])
        print(line.ljust(self._width), end=end, file=sys.stderr, flush=True)
        self._width = len(line)


class Bars:
    """A bar for each count, redrawn in place; none is left at the end.

    There is nothing to see before ``after`` seconds have gone by since the first count.
    """

    def __init__(self, after: float = 0.0) -> None:
        from rich.console import Console
        from rich.live import Live

        self._after = after
        self._starter: threading.Timer | None = None
        self._counts = Counts()
        self._console = Console(stderr=True)
        self._live = Live(
            console=self._console,
            refresh_per_second=_REDRAWS,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # else it is for a file, not for the terminal
            get_renderable=self._drawn,
        )

    def note(self, text: str) -> None:
        """Print the text above the bars."""
        for line in text.splitlines():
            width = self._console.width
            lines = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
            # A folder longer than that is left whole, so that it can be copied.
            self._console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)

    def advance(self, what: str, done: int, total: int | None, text: str = "") -> None:
        """Move the bar of ``what``."""
        self._counts.advance(what, done, total, text)
        # Not before there is something to draw: until then others may draw bars, as of a download.
        if not self._after:
            self._live.start(refresh=True)
        elif self._starter is None:
            self._starter = threading.Timer(self._after, self._live.start, kwargs={"refresh": True})
            self._starter.daemon = True
            self._starter.start()

    def close(self, what: str) -> None:
        """Take its bar away, and the bars below."""
        self._counts.close(what)

    def end(self) -> None:
        """Take all bars away."""
        if self._starter is not None:
            self._starter.cancel()
            self._starter.join()
        self._live.stop()

    def _drawn(self) -> Any:
        from rich.text import Text

        size, encoding = self._console.size, self._console.encoding
        signs = "━╸─" if encoding.startswith("utf") else "##-"
        drawn = bar_lines(list(self._counts.values()), size.width, time.monotonic(), signs)
        text = Text("\n".join(drawn), no_wrap=True, overflow="crop")
        text.highlight_regex(f"[{signs[:2]}]+", "cyan")
        text.highlight_regex(f"{signs[2]}{{2,}}", "bright_black")
        return text


def redraws() -> bool:
    """Whether standard error is a terminal where lines can be drawn anew.

    What a notebook shows of a command (``!lossprune …``) is a terminal to the command, but one
    without a cursor: whatever is drawn anew is there once more.
    """
    in_notebook = "JPY_PARENT_PID" in os.environ or "inline" in os.environ.get("MPLBACKEND", "")
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return sys.stderr is not None and sys.stderr.isatty() and not (in_notebook or dumb)


def is_watched() -> bool:
    """Whether somebody reads standard error as it is written: on a terminal or in a notebook."""
    stream = sys.stderr  # None where there is none
    return stream is not None and (stream.isatty() or _is_a_cells(stream))


def _is_a_cells(stream: object) -> bool:
    """Whether what is written there appears below a notebook's cell."""
    return type(stream).__module__.partition(".")[0] == "ipykernel"


@contextmanager
def shown_progress(show: bool = True, after: float = 0.0) -> Iterator[Progress]:
    """Give bars where standard error is a terminal, else plain lines; silence if not ``show``.

    Nothing is shown of what ends within ``after`` seconds.
    """
    if not show:
        yield Silent()
        return
    drawn = Bars(after) if redraws() else OneLine(after) if _is_a_cells(sys.stderr) else None
    if drawn is None:
        yield ProgressLines(after)
        return
    try:
        yield drawn
    finally:
        drawn.end()
