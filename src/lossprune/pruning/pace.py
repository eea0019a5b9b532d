"""How far a stage is; where its curvature will take long, how long, and what makes it shorter."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lossprune.counts import rough_duration
from lossprune.progress import Progress
from lossprune.pruning.curvature.estimators import MonteCarlo

_LONG = 300.0  # seconds of a whole pruning, from which on it is foretold
_TELLING = 5.0  # seconds of measuring, after which it can be told how long all will take
_FEWER = (1000, 5)  # examples and stages that are proposed instead of more


class LongPruningWarning(UserWarning):
    """By the pace of its first examples, a pruning that has begun will take long."""


@dataclass(frozen=True)
class Forecast:
    """What the curvature of a pruning takes.

    Attributes:
        seconds: in all stages.
        examples: of a stage.
        passes: backward passes for an example.
        stages: how many.
    """

    seconds: float
    examples: int
    passes: int
    stages: int

    def told(self, spell: Callable[[str, object], str] = "{}={!r}".format) -> str:
        """Return it in a sentence without its end, with what makes it shorter.

        Args:
            spell: gives the words that set a setting to a value.

        >>> Forecast(100_000.0, 50_000, 99, 14).told()
        "the exact curvature, 99 backward passes for each of 50,000 examples in each of 14 stages, \
will take about 27 h; about 33 min with examples=1000, 2 h 48 min with estimator='monte-carlo' \
(10 passes), 9 h 55 min with stages=5"
        """
        shorter = [
            f"{rough_duration(self.seconds * share)} with {words}"
            for share, words in self._shorter(spell)
        ]
        return (
            f"the exact curvature, {self.passes:,} backward passes for each of "
            f"{self.examples:,} examples in each of {self.stages:,} stages, will take about "
            f"{rough_duration(self.seconds)}" + (f"; about {', '.join(shorter)}" if shorter else "")
        )

    def _shorter(self, spell: Callable[[str, object], str]) -> Iterator[tuple[float, str]]:
        """The share that is left of the time, and the words for it."""
        examples, stages = _FEWER
        labels = MonteCarlo().labels
        if self.examples > examples:
            yield examples / self.examples, spell("examples", examples)
        if self.passes > labels:
            words = spell("estimator", "monte-carlo")
            yield labels / self.passes, f"{words} ({labels} passes)"
        if self.stages > stages:
            yield stages / self.stages, spell("stages", stages)


class Pace:
    """Hears of every chunk of examples that is measured, and of parts of one.

    Args:
        stages: how many there will be.
        progress: is told of them.
        on_long: gets the forecast, once, where it is long.
    """

    def __init__(
        self, stages: int, progress: Progress, on_long: Callable[[Forecast], None]
    ) -> None:
        self._stages, self._progress, self._on_long = stages, progress, on_long
        self._examples, self._done = 0, 0.0
        self._since = 0.0
        # over all measurements of exact curvature so far
        self._seconds, self._measured = 0.0, 0.0
        self._warm = self._foretold = False

    def begin(self, examples: int) -> None:
        """A stage begins, of so many examples; 0: it cannot be said how many."""
        self._examples = examples

    def end(self) -> None:
        """The stage is at its end."""
        self._progress.close("example")

    def __call__(self, examples: float, passes: int) -> None:
        """So many examples more are measured; at the beginning 0, and passes of exact curvature.

        Of an example that takes long, some of its passes are a part.
        """
        now = time.perf_counter()
        if not examples:
            self._done = 0.0
        elif passes and not self._foretold:
            self._foretell(examples, now - self._since, passes)
        before, self._done = round(self._done), self._done + examples
        self._since = now
        if self._examples and (not examples or round(self._done) > before):
            self._progress.advance("example", round(self._done), self._examples)

    def _foretell(self, examples: float, seconds: float, passes: int) -> None:
        # What the first ones take is mostly that they are the first, unless it is long.
        if self._warm or seconds >= _TELLING:
            self._seconds += seconds
            self._measured += examples
        self._warm = True
        if self._seconds < _TELLING or not self._examples:
            return
        self._foretold = True
        seconds = self._seconds / self._measured * self._examples * self._stages
        if seconds >= _LONG:
            self._on_long(Forecast(seconds, self._examples, passes, self._stages))
