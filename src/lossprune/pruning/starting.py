"""Masks that a pruning may begin with, and what it takes to go on with one that was stopped."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lossprune.pruning.mask import Mask
from lossprune.pruning.prunable import check_mask
from lossprune.pruning.selection import Selection

if TYPE_CHECKING:  # which checks its start when it is made
    from lossprune.pruning.settings import Pruning


def check_resumed(
    pruning: "Pruning",
    completed: int,
    done: Sequence[Any],
    averages: Mapping[str, Tensor] | None,
) -> None:
    """Raise a ``ValueError`` unless stages can go on after so many, of these records."""
    total = pruning.path.total
    if completed < 0 or (total is not None and completed >= total):
        most = "" if total is None else f" and {total - 1}"
        between = "at least 0" if total is None else "between 0"
        raise ValueError(f"completed must be {between}{most}, got {completed!r}")
    found = total is None or pruning.penalty is None or pruning.budget is not None
    if found and len(done) != completed:
        raise ValueError(
            f"what is found on the way goes on from the records of all {completed} completed "
            f"stages, got {len(done)}: give done="
        )
    if completed and pruning.share and not averages:
        raise ValueError(
            "statistics averaged over stages go on from those of the last stage: give averages="
        )
    if completed and pruning.budget is not None and pruning.validation is None:
        raise ValueError("a budget goes on with the data that it was judged on: give validation=")


def check_reached(pruning: "Pruning", mask: Mask, completed: int) -> None:
    """Raise a ``ValueError`` unless stages can go on from this mask after so many."""
    _check_is_mask(mask, pruning.network.weights)
    pruning.selection.check_start(mask)
    if pruning.path.steps is None:
        return
    selection, sparsity = pruning.selection, pruning.path.steps[completed]
    if not selection.reaches(mask, sparsity):
        raise ValueError(
            f"start has {selection.lost(mask)} {selection.unit} removed, but stage "
            f"{completed + 1} removes {selection.amount(sparsity)} in all"
        )


def check_start(
    start: Mask, weights: dict[str, Tensor], selection: Selection, sparsity: float | None
) -> None:
    """Raise a ``ValueError`` unless a pruning to this sparsity can begin from this mask."""
    _check_is_mask(start, weights)
    if sparsity is None or selection.reaches(start, sparsity):
        return
    if selection.costs is None:
        raise ValueError(
            f"start has {start.removed} of {start.total} weights removed, but sparsity "
            f"{sparsity} is {selection.amount(sparsity)} of them: it must be at least "
            f"{selection.sparsity(start.removed)}"
        )
    left = selection.whole - selection.lost(start)
    raise ValueError(
        f"start leaves {left} of {selection.whole} {selection.unit}, fewer than the "
        f"{selection.whole - selection.amount(sparsity)} asked for: the share asked for must be at "
        f"most {left / selection.whole}"
    )


def _check_is_mask(start: Any, weights: dict[str, Tensor]) -> None:
    if not isinstance(start, Mask):
        raise ValueError(f"start must be a lossprune.Mask, got {type(start).__name__}")
    check_mask(start, weights, "start")
