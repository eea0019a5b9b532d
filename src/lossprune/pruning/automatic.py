"""What a pruning finds on its way, as it is asked for: λ, stages, budgets; and their checks."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lossprune.pruning.criteria import Criterion
from lossprune.pruning.mask import Mask
from lossprune.pruning.path import Path
from lossprune.pruning.schedules import sparsities
from lossprune.pruning.strides import TOLERANCE, Strides
from lossprune.pruning.validation import Budget

AUTO = "auto"
# until(mask, moved): whether it holds of the network at the mask, with parameters and buffers that
# the pruning has moved, by name.  Where it holds, it holds of every mask that removes more.
Until = Callable[[Mask, Mapping[str, Tensor]], bool]
# β of the statistics where λ, stages or the sparsity is found on the way, by a criterion that has a
# gradient.
SHARE = 0.9
# Where no sparsity is given, the number of stages is that to this one, at strides of equal length.
_FAR = 0.99
# And that number where it is not given: a budget is mostly spent long before, so stages are short.
_STAGES_FAR = 112


def default_stages(criterion: Criterion, final: float | None) -> int:
    """Return π where it is not given; ``final`` is None where a budget alone says how far to go."""
    local = criterion.stages > 1
    return max(criterion.stages, _STAGES_FAR) if final is None and local else criterion.stages


def check_reg(reg: Any, criterion: Criterion) -> float | None:
    """Return λ: as given, or the criterion's; None: it is chosen at every stage.

    Raises:
        ValueError: neither "auto" nor a number of at least 0; or no λ changes what goes.
    """
    if reg == AUTO and isinstance(reg, str):
        if not (criterion.gradient or criterion.curvature or criterion.statistic):
            raise ValueError(
                f'reg="auto" has nothing to choose for {criterion.name}, which ranks by '
                "the weights alone: leave reg out"
            )
        return None
    reg = criterion.reg if reg is None else reg
    number = isinstance(reg, (int, float)) and not isinstance(reg, bool)
    if not (number and 0 <= reg <= sys.float_info.max):
        raise ValueError(f'reg must be a number of at least 0 or "auto", got {reg!r}')
    return reg


def check_average(average: Any, *, automatic: bool) -> float:
    """Return β, where it is not given that of an ``automatic`` one, or 0.

    Raises:
        ValueError: not in [0, 1).
    """
    if average is None:
        return SHARE if automatic else 0.0
    if not (isinstance(average, (int, float)) and 0 <= average < 1) or isinstance(average, bool):
        raise ValueError(f"average must be a number in [0, 1), got {average!r}")
    return float(average)


def check_budget(loss: Any, error: Any) -> Budget | None:
    """Return what the pruning may cost, if there is a limit.

    Raises:
        ValueError: a limit that is not a finite number of at least 0.
    """
    for name, limit in (("max_loss_increase", loss), ("max_error_increase", error)):
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if limit is not None and not (number and 0 <= limit < math.inf):
            raise ValueError(f"{name} must be a number of at least 0, or None, got {limit!r}")
    return None if loss is None and error is None else Budget(loss, error)


def check_until(until: Any, sparsity: Any, share: Any) -> None:
    """Raise a ``ValueError`` unless it can be asked, and it alone says how far to prune.

    Args:
        until: as given.
        sparsity: as given, and
        share: of a cost: what says so too.
    """
    if until is None:
        return
    if not callable(until):
        raise ValueError(f"until must be a function of (mask, moved), got {until!r}")
    for name, value in (("sparsity", sparsity), ("multiply_adds", share)):
        if value is not None:
            raise ValueError(
                f"until says how far to prune, and so does {name}={value!r}: leave one of them out"
            )


def check_strides(
    stages: Any, criterion: Criterion, *, examples: int | None, **limits: Any
) -> Strides | None:
    """Return how stages follow the model, if ``stages`` is "auto".

    Args:
        stages: as given.
        criterion: whose model it is.
        examples: of a stage.
        limits: ``tolerance``, ``max_examples`` and ``seconds``, as given.

    Raises:
        ValueError: a limit without ``stages="auto"`` or out of range; no model of the loss; fewer
            examples in all than one stage reads.
    """
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if not (isinstance(stages, str) and stages == AUTO):
        for name, limit in given.items():
            raise ValueError(f'{name}={limit!r} is for stages="auto", got stages={stages!r}')
        return None
    if criterion.change is None:
        raise ValueError(
            f'stages="auto" follows how well a model predicts the loss, and {criterion.name} has '
            "none: give a number of stages"
        )
    for name, limit in given.items():
        number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if not (number and 0 < limit < math.inf):
            raise ValueError(f"{name} must be a number above 0, or None, got {limit!r}")
    most = given.get("max_examples")
    if most is not None and (examples is None or most < examples):
        raise ValueError(
            f"max_examples={most} is a ceiling on what all stages read: give examples=, what one "
            f"reads, and at least as many, got examples={examples!r}"
        )
    return Strides(
        tolerance=given.get("tolerance", TOLERANCE),
        stages=None if most is None or examples is None else int(most // examples),
        seconds=given.get("seconds"),
    )


def path_of(
    *,
    strides: Strides | None,
    schedule: str | Sequence[float],
    stages: Any,
    final: float | None,
    began: float,
    finish: int,
) -> Path:
    """Return where stages end; ``final`` is None where a budget alone says how far they go.

    Raises:
        ValueError: as :func:`lossprune.sparsities`; a sequence of sparsities, or stages at the
            final mask, where stages are found on the way.
    """
    open_ended = strides is not None or final is None
    if open_ended and not isinstance(schedule, str):
        raise ValueError(
            "a schedule that is a sequence says every stage and the last one: leave out "
            'stages="auto", and give sparsity with a budget'
        )
    if open_ended and finish:
        raise ValueError(
            f"Compensation(finish={finish}) is for a number of stages and a sparsity that are "
            "given: with stages or a sparsity found on the way, the last stage is not known before"
        )
    if strides is not None:
        if final is not None:
            sparsities("linear", final, 1, began)
        return Path(None, began, final, strides)
    if final is None:
        steps = sparsities(schedule, _FAR, stages)
        return Path(None, began, None, even=-math.log1p(-_FAR) / len(steps))
    steps = sparsities(schedule, final, stages, began)
    return Path(steps + steps[-1:] * finish, began, final)
