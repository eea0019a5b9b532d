"""Sparsities from stage to stage."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import lossprune
from lossprune.pruning import SCHEDULES


@pytest.mark.parametrize(
    ("schedule", "sparsity", "stages", "expected"),
    [
        ("linear", 0.5, 1, (0.5,)),
        ("linear", 0.8, 4, (0.2, 0.4, 0.6, 0.8)),
        ("exponential", 0.5, 1, (0.5,)),
        ("exponential", 0.75, 2, (0.5, 0.75)),
        ("exponential", 0.99, 2, (0.9, 0.99)),
        ("exponential", 0.5904, 4, (0.2, 0.36, 0.488, 0.5904)),
        ("exponential", 0.0, 3, (0.0, 0.0, 0.0)),
        ("cubic", 0.5, 2, (0.4375, 0.5)),
        ("cubic", 0.8, 4, (0.4625, 0.7, 0.7875, 0.8)),
        ("linear", 0.0, 2, (0.0, 0.0)),
    ],
)
def test_literal_values(schedule, sparsity, stages, expected):
    assert lossprune.sparsities(schedule, sparsity, stages) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_from_where_a_network_is(schedule):
    """The steps after the second are those of a schedule of their own that begins there."""
    whole = lossprune.sparsities(schedule, 0.9, 5)
    rest = lossprune.sparsities(schedule, 0.9, 3, start=whole[1])
    assert rest == pytest.approx(whole[2:], rel=1e-12)
    assert lossprune.sparsities(schedule, 0.9, 2, start=0.9) == (0.9, 0.9)
    with pytest.raises(ValueError, match=r"start must be at most the sparsity 0\.8, got 0\.9"):
        lossprune.sparsities(schedule, 0.8, 3, start=0.9)


def test_the_published_targets_leave_whole_powers_of_four_fifths():
    steps = lossprune.sparsities("exponential", 1 - 0.8**14, 14)
    assert steps == pytest.approx([1 - 0.8**i for i in range(1, 15)], rel=1e-12)


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    sparsity=st.floats(0, 1, exclude_max=True),
    stages=st.integers(1, 300),
)
@example(schedule="exponential", sparsity=1.8578101612806235e-15, stages=35)
def test_rises_to_exactly_the_target(schedule, sparsity, stages):
    steps = lossprune.sparsities(schedule, sparsity, stages)
    assert len(steps) == stages
    assert steps[-1] == sparsity
    assert all(later >= earlier for earlier, later in zip((0.0, *steps), steps, strict=False))
    assert isinstance(steps, tuple)
    assert {type(step) for step in steps} == {float}


@given(sparsity=st.floats(0, 0.9999), stages=st.integers(2, 50))
def test_exponential_removes_the_same_fraction_of_what_remains(sparsity, stages):
    steps = (0.0, *lossprune.sparsities("exponential", sparsity, stages))
    left = [1 - step for step in steps]
    ratios = [after / before for before, after in pairwise(left)]
    assert ratios == pytest.approx([(1 - sparsity) ** (1 / stages)] * stages, rel=1e-6)


@pytest.mark.parametrize("schedule", [(0.1, 0.5, 0.9), [0.1, 0.5, 0.9], np.array([0.1, 0.5, 0.9])])
def test_a_sequence_is_itself_the_schedule(schedule):
    assert lossprune.sparsities(schedule, 0.9, 3) == (0.1, 0.5, 0.9)
    assert lossprune.sparsities(schedule, 0.9) == (0.1, 0.5, 0.9)


def test_one_stage_where_none_are_given():
    assert lossprune.sparsities("exponential", 0.7) == (0.7,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosine", 0.5, 2), r"schedule 'cosine'.*exponential.*linear"),
        (("linear", 1.0, 2), r"sparsity must be a number in \[0, 1\), got 1\.0"),
        (("linear", -0.1, 2), r"got -0\.1"),
        (("linear", float("nan"), 2), "got nan"),
        (("linear", float("inf"), 2), "got inf"),
        (("linear", "half", 2), "got 'half'"),
        (("linear", 0.5, 0), "stages must be a whole number from 1 to 1,000,000, got 0"),
        (("exponential", 0.5, 10**9), "stages must be a whole number from 1 to 1,000,000, got"),
        (("linear", 10**400, 2), r"sparsity must be a number in \[0, 1\), got 1000"),
        (("linear", 0.5, 2.5), r"got 2\.5"),
        (("linear", 0.5, True), "got True"),
        (((0.5, 0.3, 0.9), 0.9, 3), r"rising sequence.*\(0\.5, 0\.3, 0\.9\)"),
        (((), 0.9, 1), "rising sequence"),
        (((), 0.9), "stages must be a whole number from 1 to "),
        (((0.3, 0.9), 0.9, 3), "2 entries, but stages is 3"),
        (((0.3, 0.8), 0.9, 2), r"ends at 0\.8, but sparsity is 0\.9"),
        (((0.3, 1.0), 0.9, 2), r"got 1\.0"),
        (((float("nan"), 0.9), 0.9, 2), "got nan"),
    ],
)
def test_what_is_not_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        lossprune.sparsities(*arguments)
