"""What the settings of a pruning need of one another."""

from collections.abc import Iterator
from numbers import Integral
from typing import TYPE_CHECKING, Any

from lossprune.pruning.criteria import find_criterion
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.examples import check_examples
from lossprune.pruning.curvature.forms import check_batches
from lossprune.pruning.curvature.losses import AnyFunction, find_loss
from lossprune.pruning.names import find_in
from lossprune.pruning.patterns import Pattern
from lossprune.pruning.terms import TERMS

if TYPE_CHECKING:  # it calls this when it is made
    from lossprune.pruning.settings import Pruning

# When running statistics may be estimated anew: after every stage, or after the last one.
RECALIBRATED = ("stages", "end")
_FEW_STAGES = 1000  # that any network may be pruned in, a toy with fewer weights as well


def check_together(pruning: "Pruning") -> None:
    """Raise a ``ValueError`` unless what each setting needs of the others is there."""
    _check_numbers(pruning)
    _check_data(pruning)
    _check_moving(pruning)
    _check_found(pruning)
    _check_validation(pruning)


def check_target(share: Any, sparsity: Any, pattern: Pattern | None) -> None:
    """Raise a ``ValueError`` where how far a pruning goes is said twice."""
    if share is None:
        return
    if sparsity is not None:
        raise ValueError(
            f"multiply_adds={share!r} says how far to prune, and so does sparsity={sparsity!r}: "
            "leave one of them out"
        )
    if pattern is not None:
        raise ValueError(
            f"multiply_adds={share!r} says how far to prune, and so does pattern {str(pattern)!r}: "
            "leave one of them out"
        )


def _check_numbers(pruning: "Pruning") -> None:
    total = pruning.selection.total
    check_examples(pruning.examples)
    if pruning.seed is not None and not isinstance(pruning.seed, Integral):
        raise ValueError(f"seed must be a whole number or None, got {pruning.seed!r}")
    stages = pruning.path.total
    if stages is not None and stages > max(total, _FEW_STAGES):
        raise ValueError(
            f"stages must be at most {max(total, _FEW_STAGES):,} for {total:,} prunable "
            f"weights, of which each stage is to remove some, got {stages}"
        )


def _check_data(pruning: "Pruning") -> None:
    criterion = find_criterion(pruning.criterion)
    statistic = criterion.statistic
    term = None if statistic is None else find_in(TERMS, statistic, "statistic")
    if pruning.data is None:
        if criterion.gradient or criterion.curvature or (term and term.needs_data):
            raise ValueError(
                f"criterion {criterion.name!r} needs data: an iterable of (inputs, targets)"
            )
        if pruning.examples is not None:
            raise ValueError(
                f"examples={pruning.examples!r} asks for examples, but no data is given"
            )
    stages = pruning.path.total
    if stages != 1 and isinstance(pruning.data, Iterator):
        asked = pruning.stages is not None or not isinstance(pruning.schedule, str)
        raise ValueError(
            f"data is iterated anew at each of {stages or 'several'} stages"
            + ("" if asked else f", what {criterion.name} takes if stages is not given")
            + ", but an iterator can be used only once: give a list or a DataLoader"
            + ("" if asked else ", or stages=1")
        )
    if pruning.data is not None:
        check_batches(pruning.data, pruning.forward)
    if not pruning.sharded:
        distributed.check_undivided(pruning.data)


def _check_moving(pruning: "Pruning") -> None:
    if pruning.recalibrate not in (None, *RECALIBRATED):
        raise ValueError(
            f"recalibrate must be None or one of {', '.join(RECALIBRATED)}, got "
            f"{pruning.recalibrate!r}"
        )
    for name, asked in (
        ("compensate", pruning.compensation is not None),
        ("recalibrate", pruning.recalibrate is not None),
    ):
        if asked and pruning.data is None:
            raise ValueError(f"{name} needs data: an iterable of (inputs, targets)")
    if pruning.compensation is None:
        return
    for name, weight in pruning.network.weights.items():
        if weight.is_complex():
            raise ValueError(
                f"compensate moves real weights, but {name!r} is complex, of {weight.dtype}: "
                f"leave compensate out, or give exclude={name!r}"
            )
    loss = find_loss(pruning.loss)
    if isinstance(loss, AnyFunction):
        raise ValueError(
            f"compensate needs the curvature of the loss, but {loss.name} is a plain "
            f"function: give one of {', '.join(loss.known)} or a lossprune.pruning.Loss"
        )


def _check_found(pruning: "Pruning") -> None:
    """Check what λ, stages and budgets that are found on the way need."""
    criterion = find_criterion(pruning.criterion)
    asked = {
        'reg="auto"': pruning.penalty is None,
        'stages="auto"': pruning.path.strides is not None,
        "a budget": pruning.budget is not None,
    }
    for what, given in asked.items():
        if given and pruning.data is None and not (what == "a budget" and pruning.validation):
            raise ValueError(f"{what} needs data: an iterable of (inputs, targets)")
        if given and pruning.sharded:
            raise ValueError(f"{what} is not for data that are sharded among processes")
    if pruning.average and not (criterion.gradient or criterion.curvature):
        raise ValueError(
            f"average={pruning.average!r} is of gradient and curvature, which "
            f"{criterion.name} does not measure"
        )
    if pruning.budget is not None and pruning.until is not None:
        raise ValueError(
            "a budget asks for as many weights removed as it allows, and until for as few as are "
            "enough: leave one of them out"
        )
    ends = "a budget" if pruning.budget is not None else "until"
    if pruning.budget is None and pruning.until is None:
        return
    if pruning.selection.pattern is not None:
        raise ValueError(
            f"{ends} ends a pruning in the midst of a stage, but pattern {pruning.pattern!r} is "
            "there as a whole or not at all: leave one of them out"
        )
    if pruning.recalibrate == "end":
        raise ValueError(
            f'recalibrate="end" comes after the last stage, and {ends} is judged before: give '
            'recalibrate="stages"'
        )


def _check_validation(pruning: "Pruning") -> None:
    if isinstance(pruning.validation, Iterator):
        raise ValueError(
            "validation is iterated anew for every mask, but an iterator can be used only "
            "once: give a list or a DataLoader"
        )
    if pruning.validation is not None:
        check_batches(pruning.validation, pruning.forward)
