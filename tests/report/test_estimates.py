import math

import numpy as np
import pandas as pd
import pytest

from lossprune.report.estimates import central_probability, estimate, ranks, spearman, t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # two-sided 95 % points of published tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_are_the_published_ones(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_other_levels_and_the_normal_limit():
    assert t_quantile(5, 0.99) == pytest.approx(4.032, abs=6e-4)
    assert t_quantile(9999) == pytest.approx(1.9602, abs=1e-4)
    assert central_probability(1.0, 1) == pytest.approx(0.5)
    assert central_probability(math.sqrt(2), 2) == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize(("freedom", "level"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_no_quantile_where_there_is_no_distribution(freedom, level):
    with pytest.raises(ValueError, match="freedom must be at least 1 and level in"):
        t_quantile(freedom, level)


def test_estimate_of_five_seeds():
    found = estimate([1.0, 2.0, 4.0, 5.0, 3.0])
    assert (found.n, found.mean) == (5, 3.0)
    assert found.std == pytest.approx(math.sqrt(2.5))
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))


def test_one_measurement_has_a_mean_and_no_spread():
    found = estimate([2.5, math.nan, math.inf])
    assert (found.n, found.mean) == (1, 2.5)
    assert all(math.isnan(value) for value in (found.std, found.low, found.high))
    assert estimate([math.nan]).n == 0
    assert math.isnan(estimate([]).mean)


def test_two_measurements_have_a_spread_and_no_interval():
    found = estimate([0.01, 0.03])
    assert (found.n, found.mean, found.std) == (2, 0.02, pytest.approx(0.02 / math.sqrt(2)))
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_an_interval_ends_where_values_do():
    low, high = 0.02 - 0.0248435, 0.02 + 0.0248435  # 4.302653 · 0.01 / √3
    free = estimate([0.01, 0.02, 0.03])
    assert (free.low, free.high) == (pytest.approx(low, abs=2e-5), pytest.approx(high, abs=2e-5))
    assert estimate([0.01, 0.02, 0.03], within=(0, 1)).low == 0
    assert estimate([0.97, 0.98, 0.99], within=(0, 1)).high == 1


# Ten people's IQ and hours of television: rho = -29/165, worked in many textbooks.
IQ = np.array([106.0, 100, 86, 101, 99, 103, 97, 113, 112, 110])
HOURS = np.array([7.0, 27, 2, 50, 28, 29, 20, 12, 6, 17])


def test_spearman_of_the_textbook():
    assert spearman(IQ, HOURS, resamples=10).rho == pytest.approx(-29 / 165)


def test_spearman_with_ties_by_hand():
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5: 3.75 / sqrt(4.5 * 4.5)
    found = spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 3]), resamples=10)
    assert found.rho == pytest.approx(3.75 / 4.5)
    assert ranks(np.array([1.0, 2, 3, 3])).tolist() == [1, 2, 3.5, 3.5]


def test_the_interval_is_that_of_resampled_and_ranked_pairs():
    generator = np.random.default_rng(3)
    x = generator.integers(0, 12, 40).astype(float)
    y = x + 4 * generator.standard_normal(40)
    found = spearman(x, y, resamples=300, generator=np.random.default_rng(7))
    draws = np.random.default_rng(7)
    oracle = []
    for _ in range(300):
        pick = draws.integers(40, size=40)
        oracle.append(pd.Series(x[pick]).rank().corr(pd.Series(y[pick]).rank()))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(oracle, [2.5, 97.5])))
    assert found.low < found.rho < found.high
    assert spearman(x, y) == spearman(x, y)


def test_what_has_no_correlation_says_so():
    for x, y in (([1, 2, 3], [1, 2, 3]), ([1, 1, 1, 1], [1, 2, 3, 4])):
        found = spearman(np.array(x, dtype=float), np.array(y, dtype=float))
        assert found.n == len(x)
        assert math.isnan(found.rho)
    holes = spearman(np.array([1, 2, math.nan, 4, 5, 6]), np.array([1.0, 2, 3, math.inf, 5, 6]))
    assert (holes.n, holes.rho) == (4, 1.0)
