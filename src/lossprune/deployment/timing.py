"""How long calls take: by which clock, and how it spreads."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_FINEST = 1e-6  # seconds: a clock that ticks slower cannot time a layer


def clock() -> Callable[[], float]:
    """Return the clock that choices are made by, in seconds.

    Where torch uses one thread that is the thread's own processor time, which does not run while
    another program has the core; with several, which wait for one another, the time that passes.

    >>> clock()() > 0
    True
    """
    alone = torch.get_num_threads() == 1
    fine = time.get_clock_info("thread_time").resolution <= _FINEST
    return time.thread_time if alone and fine else time.perf_counter


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over many: the median, the quartiles, and the shortest.

    Whatever else a machine does only makes calls longer, so the shortest is what choices rest on.

    >>> Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
    Timing(best=1.0, median=3.0, low=2.0, high=4.0, count=5)
    """

    best: float
    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Return the quartiles of ``seconds``."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        low, median, high = (ordered[round(last * share)] for share in (0.25, 0.5, 0.75))
        return cls(ordered[0], median, low, high, len(ordered))


def interleaved(
    calls: Sequence[Callable[[], object]],
    *,
    seconds: float = 0.3,
    least: int = 10,
    now: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time ``calls`` in turn, round after round, so that a busy machine slows all alike.

    Each is called once more right before it is timed: none pays for what the one before it left in
    the caches, or gains by it.

    Args:
        calls: what is timed.
        seconds: how long all of it may take, ...
        least: but at least so many rounds.
        now: the clock.
    """
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(taken[0]) < least or (time.perf_counter() < end and len(taken[0]) < 10_000):
        for call, times in zip(calls, taken, strict=True):
            call()
            start = now()
            call()
            times.append(now() - start)
    return [Timing.of(times) for times in taken]
