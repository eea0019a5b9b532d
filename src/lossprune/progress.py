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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

_LINES = 30  # of one count, a line each; from then on one every so often, and the last
_LINE_SECONDS = 2.0
_SILENT_SECONDS = 10.0  # after which a line tells of a count that has nothing else to say
_REDRAWS = 4  # a second
_WIDE = 100  # columns, from which on bars are longer


class Progress(Protocol):
    """Who is told as it goes."""

    def note(self, text: str) -> None:
        """Say one thing."""

    def advance(self, what: str, done: int, total: int, text: str = "") -> None:
        """Say that ``done`` of ``total`` are done, such as epochs, and how the last one went.

        Args:
            what: the name of one: ``epoch``.
            done: 0: the first has begun.
            total: how many there will be.
            text: parts with a comma between them, the one that matters most first: where there is
                little space, the last ones are left out.
        """

    def close(self, what: str) -> None:
        """Say that there is nothing more to tell of ``what``, nor of what was begun within it."""


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def advance(self, what: str, done: int, total: int, text: str = "") -> None:
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

    def advance(self, what: str, done: int, total: int, text: str = "") -> None:
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

    def advance(self, what: str, done: int, total: int, text: str = "") -> None:
        """Print ``epoch 3/200: …``, unless there has been a line of it just now."""
        lines, silent = self._lines.get(what, 0), time.monotonic() - self._said
        if text:
            due = lines < _LINES or done == total or silent >= _LINE_SECONDS
        else:
            due = done > 0 and silent >= _SILENT_SECONDS
        if due and time.monotonic() >= self._first:
            self._lines[what] = lines + 1
            self.note(f"{what} {done}/{total}" + (f": {text}" if text else ""))

    def close(self, what: str) -> None:
        """Print nothing."""


@dataclass
class Count:
    """How far one thing is.

    Attributes:
        what, done, total, text: as :meth:`Progress.advance` has them.
        began: when it was, in seconds.
        first: how many were done then.
        changed: when the last one was done.
    """

    what: str
    done: int
    total: int
    text: str
    began: float
    first: int = field(init=False)
    changed: float = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.changed = self.done, self.began

    def advance(self, done: int, total: int, text: str, now: float) -> None:
        """Take note that so many are done."""
        self.done, self.total, self.changed = done, total, now
        self.text = text or self.text

    def seconds_left(self, now: float) -> float | None:
        """Return for how long it will go on, if the others take as long as those done so far."""
        if self.done <= self.first:
            return None
        each = (self.changed - self.began) / (self.done - self.first)
        return max(each * (self.total - self.done) - (now - self.changed), 0.0)


class Bars:
    """A bar for each count, redrawn in place; none is left at the end.

    There is nothing to see before ``after`` seconds have gone by since the first count.
    """

    def __init__(self, after: float = 0.0) -> None:
        from rich.console import Console
        from rich.live import Live

        self._after = after
        self._starter: threading.Timer | None = None
        self._counts: dict[str, Count] = {}
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

    def advance(self, what: str, done: int, total: int, text: str = "") -> None:
        """Move the bar of ``what``."""
        counted, now = self._counts.get(what), time.monotonic()
        if counted is None or done < counted.done:
            self._counts[what] = Count(what, done, total, text, now)
        else:
            counted.advance(done, total, text, now)
        # Not before there is something to draw: until then others may draw bars, as of a download.
        if not self._after:
            self._live.start(refresh=True)
        elif self._starter is None:
            self._starter = threading.Timer(self._after, self._live.start, kwargs={"refresh": True})
            self._starter.daemon = True
            self._starter.start()

    def close(self, what: str) -> None:
        """Take its bar away, and the bars below."""
        names = list(self._counts)
        for name in names[names.index(what) :] if what in names else []:
            del self._counts[name]

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


def bar_lines(counts: Sequence[Count], width: int, now: float, signs: str = "━╸─") -> list[str]:
    """Return a line for each count: its name, bar, how many of how many, time left, its text.

    Args:
        counts: the ones begun later below, and within the others.
        width: of the terminal.
        now: the time.
        signs: for what is done, for half of that, and for what is left.

    >>> count = Count("epoch", 0, 200, "", began=0.0)
    >>> count.advance(50, 200, "error 12.3 %, loss 0.512", now=60.0)
    >>> for width in (100, 60, 50):
    ...     print(bar_lines([count], width, 60.0, "#+-")[0])
    epoch  ######------------------   50/200  3 min left   error 12.3 %, loss 0.512
    epoch  ##+-------   50/200  3 min left   error 12.3 %
    epoch  ##+-------   50/200  3 min left   error 1…
    """
    names = [" " * 2 * depth + count.what for depth, count in enumerate(counts)]
    widest = max(map(len, names), default=0)
    places = max((len(f"{count.total}/{count.total}") for count in counts), default=0)
    lines = []
    for name, count in zip(names, counts, strict=True):
        left = count.seconds_left(now)
        fixed = [
            f"{name:<{widest}}",
            _bar(count, 24 if width >= _WIDE else 10, signs),
            f"{f'{count.done}/{count.total}':>{places}}",
            f"{'' if left is None else f'{rough_duration(left)} left':<11}",
        ]
        line = "  ".join(fixed)
        lines.append(f"{line}  {_fitting(count.text, width - len(line) - 3)}".rstrip())
    return lines


def _bar(count: Count, width: int, signs: str) -> str:
    whole, half = divmod(round(2 * width * count.done / max(count.total, 1)), 2)
    return (signs[0] * whole + signs[1] * half).ljust(width, signs[2])


def _fitting(text: str, width: int) -> str:
    """Return as many of the text's parts as fit, or what fits of the first one."""
    parts = text.split(", ")
    while len(parts) > 1 and len(", ".join(parts)) > width:
        parts.pop()
    fitting = ", ".join(parts)
    return fitting if len(fitting) <= width else f"{fitting[: max(width - 1, 0)]}…"


def rough_duration(seconds: float) -> str:
    """Return a time in the fewest words.

    >>> rough_duration(7.3), rough_duration(200), rough_duration(7300), rough_duration(90_000)
    ('7 s', '3 min', '2 h 1 min', '25 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole < 36_000 else "")


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
    return stream is not None and (
        stream.isatty() or type(stream).__module__.partition(".")[0] == "ipykernel"
    )


@contextmanager
def shown_progress(show: bool = True, after: float = 0.0) -> Iterator[Progress]:
    """Give bars where standard error is a terminal, else plain lines; silence if not ``show``.

    Nothing is shown of what ends within ``after`` seconds.
    """
    if not show:
        yield Silent()
        return
    if not redraws():
        yield ProgressLines(after)
        return
    bars = Bars(after)
    try:
        yield bars
    finally:
        bars.end()
