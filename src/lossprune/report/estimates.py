"""What a few measurements say: mean and t-interval, rank correlation and bootstrap interval."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES, SEED = 2000, 0
_LEAST_SEEDS = 3  # of two the interval is 12.7 standard errors to each side, and says nothing
_LEAST = 4  # below this a rank correlation says nothing, and its resamples are mostly ties


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` measurements.

    Attributes:
        n: measurements that are numbers.
        mean: NaN where there is none.
        std: with n − 1 in the denominator; NaN below two.
        low, high: the 95 % t-interval of the mean, mean ± t · std / √n; NaN below three.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float


def estimate(
    values: Iterable[float], within: tuple[float, float] = (-math.inf, math.inf)
) -> Estimate:
    """Return mean, standard deviation and 95 % t-interval; what is not finite is left out.

    ``within`` is what a value can be, such as (0, 1) of an error: the interval is cut off there.

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
    if n < _LEAST_SEEDS:
        return Estimate(n, mean, std, math.nan, math.nan)
    half = t_quantile(n - 1) * std / math.sqrt(n)
    return Estimate(n, mean, std, max(mean - half, within[0]), min(mean + half, within[1]))


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


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ of ``n`` pairs and its 95 % percentile bootstrap interval; NaN if undefined."""

    n: int
    rho: float
    low: float
    high: float


def spearman(
    x: Array, y: Array, *, resamples: int = RESAMPLES, generator: np.random.Generator | None = None
) -> Correlation:
    """Return Spearman's ρ, Pearson's correlation of the ranks (ties share their mean rank).

    The interval is the 2.5 and 97.5 percentiles of ρ over ``resamples`` draws of n pairs with
    replacement, by ``generator`` (seeded with 0 if none is given). Pairs that are not finite are
    left out; fewer than four pairs, or a constant side, have no correlation.

    >>> spearman(np.arange(5.0), np.array([1.0, 2.0, 3.0, 5.0, 4.0]), resamples=10).rho
    0.9
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    n = len(x)
    if n < _LEAST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(n, np.nan, np.nan, np.nan)
    generator = generator or np.random.default_rng(SEED)
    x_level, y_level = (np.unique(values, return_inverse=True)[1] for values in (x, y))
    rho = _correlation(x_level, y_level, np.ones(n))
    drawn = np.array(
        [
            _correlation(
                x_level,
                y_level,
                np.bincount(generator.integers(n, size=n), minlength=n).astype(float),
            )
            for _ in range(resamples)
        ]
    )
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Correlation(n, rho, float(low), float(high))


def ranks(values: Array) -> Array:
    """Return the ranks from 1; equal values share the mean of their ranks.

    >>> ranks(np.array([10.0, 30.0, 10.0, 20.0])).tolist()
    [1.5, 4.0, 1.5, 3.0]
    """
    level = np.unique(values, return_inverse=True)[1]
    return _weighted_ranks(level, np.ones(len(level)))


def _weighted_ranks(level: NDArray[np.intp], weight: Array) -> Array:
    """Ranks of points of which ``weight`` copies each are there: no resample is sorted again."""
    count = np.bincount(level, weights=weight)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    return mean_rank[level]


def _correlation(x_level: NDArray[np.intp], y_level: NDArray[np.intp], weight: Array) -> float:
    total = weight.sum()
    x, y = _weighted_ranks(x_level, weight), _weighted_ranks(y_level, weight)
    x, y = x - (total + 1) / 2, y - (total + 1) / 2  # the mean rank, whatever the ties
    spread = np.sqrt((weight @ (x * x)) * (weight @ (y * y)))
    return float(np.clip(weight @ (x * y) / spread, -1, 1)) if spread > 0 else np.nan
