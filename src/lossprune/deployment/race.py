"""Which of several calls is fastest, found in few calls and within a budget."""

from collections.abc import Callable, Sequence

from lossprune.deployment.timing import clock

LONG = 0.02  # seconds: what lay in the caches before tells nothing of a call that takes longer
TELLING = 0.1  # seconds: a first call that takes longer does so for the computing
_FEW, _MANY = 3, 10  # rounds
_LEAST, _ENOUGH = 2e-3, 0.5  # seconds of short calls that ten rounds fill, of long ones three
_SLOWER, _SLOWER_AFTER_FEW = 1.5, 1.1  # times the best so far: out
_TOLD = 3e-3  # seconds: one call tells where it takes longer
_ALIKE = 1.05  # times the best: what two races of the same calls may differ by


class Budget:
    """Seconds that comparisons may take, by the clock that choices are made by.

    Attributes:
        left: of them; below 0 where the last call took longer.
    """

    def __init__(self, seconds: float, whole: "Budget | None" = None) -> None:
        """Take the seconds, and the budget that they are a part of."""
        self.left, self._whole = seconds, whole

    def part(self, share: float) -> "Budget":
        """Return a budget of a share of what is left; what it spends, this one spends.

        >>> whole = Budget(4.0)
        >>> part = whole.part(0.25)
        >>> part.spend(0.5)
        >>> part.left, whole.left
        (0.5, 3.5)
        """
        return Budget(max(self.left, 0.0) * share, self)

    def spend(self, seconds: float) -> None:
        """Take ``seconds`` off what is left."""
        self.left -= seconds
        if self._whole is not None:
            self._whole.spend(seconds)


def race(
    calls: Sequence[Callable[[], object]],
    budget: Budget,
    known: Sequence[float] = (),
    now: Callable[[], float] | None = None,
) -> list[float]:
    """Return the shortest time of each call.

    They are timed in turn.  One that takes 1.5 times the best so far is called no more, and after
    three rounds one that takes 1.1 times that; there are ten rounds, more of the shortest calls and
    fewer of the longest.  A short call is made once more right before it is timed: none pays for
    what the one before it left in the caches.

    Args:
        calls: what is timed, each at least once whatever the budget is.
        budget: what it may take.
        known: what a first call of each took.  Where that was long it counts, and need not be
            repeated where others are much faster.
        now: the clock; where None is given, the one that choices are made by.
    """
    unknown = float("inf")
    best = [taken if taken > TELLING else unknown for taken in known] or [unknown] * len(calls)
    # What is unknown first: it is short, and may show that the long need not be called again.
    running = sorted(range(len(calls)), key=lambda k: best[k] if best[k] < unknown else 0.0)
    spent, rounds, now = [0.0] * len(calls), 0, now or clock()
    while running:
        for k in list(running):
            if _slower(best[k], min(best), rounds, spent[k]):
                running.remove(k)
                continue
            if rounds and budget.left <= 0:
                return best
            begin = now()
            if not LONG < best[k] < unknown:
                calls[k]()
            start = now()
            calls[k]()
            end = now()
            best[k] = min(best[k], end - start)
            spent[k] += end - begin
            budget.spend(end - begin)
        rounds += 1
        if _enough(rounds, max(spent), alone=len(running) == 1):
            break
    return best


def _slower(seconds: float, best: float, rounds: int, spent: float) -> bool:
    """Whether a call, of which ``spent`` seconds were seen in so many rounds, is out.

    A short one is not by a call or two: what interrupts it costs it more than its own time.
    """
    if rounds < _FEW or spent < _TOLD:
        return float("inf") > seconds > max(_SLOWER * best, _TOLD)
    return seconds > _SLOWER_AFTER_FEW * best


def _enough(rounds: int, spent: float, *, alone: bool) -> bool:
    """Whether so many rounds, in which a call spent at most so many seconds, tell enough."""
    if spent >= _ENOUGH or rounds < _FEW:
        return spent >= _ENOUGH and (alone or rounds >= _FEW)
    return alone or (rounds >= _MANY and spent >= _LEAST)


def fastest(times: Sequence[float]) -> int:
    """Return which is fastest, the first of those that are alike: a race anew gives the same.

    >>> fastest([2.0, 1.01, 1.0])
    1
    """
    return next(k for k, taken in enumerate(times) if taken <= _ALIKE * min(times))
