"""How far things are that take long, and lines that say it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDE = 100  # columns, from which on bars are longer


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
    total: int | None
    text: str
    began: float
    first: int = field(init=False)
    changed: float = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.changed = self.done, self.began

    def advance(self, done: int, total: int | None, text: str, now: float) -> None:
        """Take note that so many are done."""
        self.done, self.total, self.changed = done, total, now
        self.text = text or self.text

    @property
    def told(self) -> str:
        """How many of how many."""
        return of_all(self.done, self.total)

    def seconds_left(self, now: float) -> float | None:
        """Return for how long it will go on, if the others take as long as those done so far."""
        if self.total is None or self.done <= self.first:
            return None
        each = (self.changed - self.began) / (self.done - self.first)
        return max(each * (self.total - self.done) - (now - self.changed), 0.0)


class Counts(dict[str, Count]):
    """What is counted, the ones begun later within the others."""

    def advance(self, what: str, done: int, total: int | None, text: str) -> None:
        """Take note that so many are done; of fewer than before, that they begin anew."""
        counted, now = self.get(what), time.monotonic()
        if counted is None or done < counted.done:
            self[what] = Count(what, done, total, text, now)
        else:
            counted.advance(done, total, text, now)

    def close(self, what: str) -> None:
        """Forget it, and what is within it."""
        names = list(self)
        for name in names[names.index(what) :] if what in names else []:
            del self[name]


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
    places = max(
        (len(of_all(count.total or count.done, count.total)) for count in counts), default=0
    )
    lines = []
    for name, count in zip(names, counts, strict=True):
        left = count.seconds_left(now)
        fixed = [
            f"{name:<{widest}}",
            _bar(count, 24 if width >= WIDE else 10, signs),
            f"{count.told:>{places}}",
            f"{'' if left is None else f'{rough_duration(left)} left':<11}",
        ]
        line = "  ".join(fixed)
        lines.append(f"{line}  {_fitting(count.text, width - len(line) - 3)}".rstrip())
    return lines


def _bar(count: Count, width: int, signs: str) -> str:
    if count.total is None:
        return " " * width
    whole, half = divmod(round(2 * width * count.done / max(count.total, 1)), 2)
    return (signs[0] * whole + signs[1] * half).ljust(width, signs[2])


def of_all(done: int, total: int | None) -> str:
    """Return how many of how many; how many, where nobody knows of how many.

    >>> of_all(3, 14), of_all(3, None)
    ('3/14', '3')
    """
    return str(done) if total is None else f"{done}/{total}"


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
