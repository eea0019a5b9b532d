"""Mean, spread and 95 % interval of a few measurements, such as one per seed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` measurements.

    Attributes:
        n: measurements that are numbers.
        mean: NaN where there is none.
        std: with n − 1 in the denominator; NaN below two.
        low, high: the 95 % t-interval of the mean, mean ± t · std / √n; NaN below two.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float


def estimate(values: Iterable[float]) -> Estimate:
    """Return mean, standard deviation and 95 % t-interval; what is not finite is left out.

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(n=3, mean=2.0, std=1.0, low=-0.484..., high=4.484...)
    """
    sample = np.asarray(list(values), dtype=np.float64)
    sample = sample[np.isfinite(sample)]
    n = len(sample)
    if n == 0:
        return Estimate(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(sample.mean())
    if n == 1:
        return Estimate(1, mean, math.nan, math.nan, math.nan)
    std = float(sample.std(ddof=1))
    half = t_quantile(n - 1) * std / math.sqrt(n)
    return Estimate(n, mean, std, mean - half, mean + half)


@cache
def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """Return t with P(|T| < t) = ``level`` for Student's t with ``freedom`` degrees of freedom.

    >>> round(t_quantile(4), 3)
    2.776
    """
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(
            f"freedom must be at least 1 and level in (0, 1), got {freedom} and {level}"
        )
    low, high = 0.0, 1.0
    while central_probability(high, freedom) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if central_probability(middle, freedom) < level:
            low = middle
        else:
            high = middle
    return high


def central_probability(t: float, freedom: int) -> float:
    """Return P(|T| < t), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(3 if odd else 2, freedom + 1, 2):
        total += term
        term *= square * (k - 1) / k
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * total)
