"""What the flags of a run's pruning need of one another.  No torch here."""

from typing import TYPE_CHECKING

from lossprune.flags import (
    AUTO,
    check_fraction,
    check_not_negative,
    check_positive,
    check_whole,
)
from lossprune.pruning.criteria import CRITERIA
from lossprune.pruning.schedules import MOST_STAGES

if TYPE_CHECKING:  # which call this when they are made
    from lossprune.experiment.pruning_flags import PruningFlags


def check_together(asked: "PruningFlags") -> None:
    """Raise a ValueError unless what each flag needs of the others is there."""
    check_finish(asked.finish, compensate=asked.compensate)
    _check_examples(asked)
    _check_criterion(asked)
    _check_strides(asked)
    _check_budget(asked)


def _check_examples(asked: "PruningFlags") -> None:
    """Check that there are examples to choose by: to be told after all training is late."""
    choosing = {
        "--reg auto": "λ" if asked.reg == AUTO else None,
        "--compensate": "the damping" if asked.compensate else None,
    }
    chosen = {flag_: what for flag_, what in choosing.items() if what}
    least = (1, 5, 6)[len(chosen)]  # a fifth is kept apart, and a fifth of the rest
    if asked.examples < least:
        raise ValueError(
            f"--nex {asked.examples} with {' and '.join(chosen)}: a fifth of the examples "
            f"choose {' and '.join(chosen.values())}, so it takes {least} at least"
        )


def _check_criterion(asked: "PruningFlags") -> None:
    """Check what is asked of a criterion; of the user's own it is asked when it is imported."""
    criterion = CRITERIA.get(asked.criterion)
    if criterion is None:
        return
    measures = criterion.gradient or criterion.curvature
    if asked.reg == AUTO and not (measures or criterion.statistic):
        raise ValueError(
            f"--reg auto has nothing to choose for {criterion.name}, which ranks by the "
            "weights alone: leave --reg out"
        )
    if asked.stages == AUTO and criterion.change is None:
        raise ValueError(
            f"--pi auto follows how well a model predicts the loss, and {criterion.name} has "
            "none: give a number of stages"
        )
    if asked.average and not measures:
        raise ValueError(
            f"--average {asked.average} is of gradient and curvature, which {criterion.name} "
            "does not measure"
        )


def _check_strides(asked: "PruningFlags") -> None:
    """Check what is asked of stages that are found on the way."""
    if asked.average is not None:
        check_fraction("average", asked.average)
    limits = {
        "tolerance": asked.tolerance,
        "max_examples": asked.max_examples,
        "seconds": asked.pruning_seconds,
    }
    for name, limit in limits.items():
        if limit is None:
            continue
        check_positive(name, limit)
        if asked.stages != AUTO:
            raise ValueError(f"--{name} {limit} is for --pi auto, got --pi {asked.stages}")
    if asked.max_examples is not None and asked.max_examples < asked.examples:
        raise ValueError(
            f"--max_examples {asked.max_examples} with --nex {asked.examples}: one stage reads "
            "more than all are to read"
        )
    if asked.finish and asked.stages_in_all is None:
        open_ended = "--pi auto" if asked.stages == AUTO else "a budget and without --pr"
        raise ValueError(
            f"--finish {asked.finish} with {open_ended}: these stages come after the last one, "
            "which is not known before"
        )


def _check_budget(asked: "PruningFlags") -> None:
    for name in ("max_loss_increase", "max_error_increase"):
        limit = getattr(asked, name)
        if limit is None:
            continue
        check_not_negative(name, limit)
        if asked.pattern != "unstructured":
            raise ValueError(
                f"--{name} {limit} with --pattern {asked.pattern}: a budget ends a pruning "
                "where it is spent, and a pattern is there as a whole or not at all"
            )
        if asked.recalibrate == "end":
            raise ValueError(
                f"--{name} {limit} with --recalibrate end, which comes after the last stage, "
                "when the budget is judged already: give --recalibrate stages"
            )


def check_finish(finish: int, *, compensate: bool) -> None:
    """Check ``--finish``, which says how a compensation ends."""
    check_whole("finish", finish, 0, MOST_STAGES)
    if finish and not compensate:
        raise ValueError(
            f"--finish {finish} without --compensate: these stages remove nothing, they only move "
            "weights; give --compensate as well"
        )
