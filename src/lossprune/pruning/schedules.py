"""How the sparsity grows from stage to stage."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from lossprune.pruning.names import find_in


def _linear(sparsity: float, stages: int, start: float = 0.0) -> list[float]:
    """Every stage removes the same number of weights."""
    return [start + (sparsity - start) * stage / stages for stage in range(1, stages + 1)]


def _exponential(sparsity: float, stages: int, start: float = 0.0) -> list[float]:
    """Every stage removes the same fraction of the weights that remain."""
    left = (1.0 - sparsity) / (1.0 - start)
    return [1.0 - (1.0 - start) * left ** (stage / stages) for stage in range(1, stages + 1)]


def _cubic(sparsity: float, stages: int, start: float = 0.0) -> list[float]:
    """Most goes early, and ever less towards the end."""
    left = [1 - stage / stages for stage in range(1, stages + 1)]
    return [sparsity + (start - sparsity) * part**3 for part in left]


MOST_STAGES = 1_000_000  # a stage measures the network: nobody has the time for more

SCHEDULES: dict[str, Callable[[float, int, float], list[float]]] = {
    "cubic": _cubic,
    "exponential": _exponential,
    "linear": _linear,
}


def sparsities(
    schedule: str | Sequence[float],
    sparsity: float,
    stages: int | None = None,
    start: float = 0.0,
) -> tuple[float, ...]:
    r"""Cumulative sparsity after each stage, for a final sparsity κ in π stages.

    From a network that is dense, or of which the fraction κ₀, ``start``, is removed already:

    - ``"linear"``: κ₀ + (κ − κ₀)·i/π;
    - ``"exponential"``: 1 − (1 − κ₀) ((1 − κ) / (1 − κ₀))^(i/π), so that each stage removes the
      same fraction 1 − ((1 − κ) / (1 − κ₀))^(1/π) of what remains;
    - ``"cubic"``: κ + (κ₀ − κ)(1 − i/π)³, most of it early, for networks that train between stages;
    - a sequence of sparsities is itself the schedule: it must not fall, and end at κ.

    ``stages`` is 1 if not given, or the length of the sequence.

    Sources: Laurent et al., "Revisiting Loss Modelling for Unstructured Pruning", 2020, section 3;
    Zhu and Gupta, "To prune, or not to prune", 2017, for the cubic one.

    >>> sparsities("linear", 0.9, 3)
    (0.3, 0.6, 0.9)
    >>> [round(kappa, 4) for kappa in sparsities("exponential", 0.875, 3)]
    [0.5, 0.75, 0.875]
    >>> [round(kappa, 4) for kappa in sparsities("exponential", 0.875, 2, start=0.5)]
    [0.75, 0.875]
    >>> sparsities("cubic", 0.5, 2)
    (0.4375, 0.5)
    """
    check_sparsity(sparsity)
    check_sparsity(start, "start")
    if start > sparsity:
        raise ValueError(f"start must be at most the sparsity {sparsity}, got {start}")
    if stages is None:
        stages = 1 if isinstance(schedule, str) else len(schedule)
    if isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= MOST_STAGES:
        raise ValueError(f"stages must be a whole number from 1 to {MOST_STAGES:,}, got {stages!r}")
    if isinstance(schedule, str):
        otherwise = ", or give a sequence of rising sparsities"
        steps = find_in(SCHEDULES, schedule, "schedule", otherwise)(sparsity, stages, start)
        # The last stage is κ itself, not κ to rounding: the final count must be exact. Where κ is
        # near the spacing of numbers around 1, a stage before it may round to more, as to less than
        # the start.
        return (*(max(start, min(step, sparsity)) for step in steps[:-1]), sparsity)
    return _checked_sequence(schedule, sparsity, stages)


def _checked_sequence(schedule: Sequence[float], sparsity: float, stages: int) -> tuple[float, ...]:
    steps = tuple(float(step) for step in schedule)
    for step in steps:
        check_sparsity(step, "every sparsity of a schedule")
    if not steps or any(later < earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"a schedule must be a rising sequence of sparsities, got {steps}")
    if len(steps) != stages:
        raise ValueError(f"the schedule has {len(steps)} entries, but stages is {stages}")
    if steps[-1] != sparsity:
        raise ValueError(f"the schedule ends at {steps[-1]}, but sparsity is {sparsity}")
    return steps


def check_sparsity(sparsity: float, what: str = "sparsity") -> None:
    """Raise a ``ValueError`` unless 0 ≤ sparsity < 1."""
    if not (isinstance(sparsity, (int, float)) and 0 <= sparsity < 1):
        raise ValueError(f"{what} must be a number in [0, 1), got {sparsity!r}")
