"""λ of a stage, chosen by the loss: a ladder of them is tried on statistics measured once.

Rungs are in units of the stage.  Among the weights that go without a penalty, with s* the largest
saliency and θ̄² the mean square,

    λ_1 = 2 s* / θ̄²

is the penalty that makes an average one of them as dear as the dearest, and rung r is
λ_1 · 10^((r − 2) / 2), but for rung 0, which is λ = 0.  A stage tries the rung of the stage before
and its two neighbours, the first one all of them.

On examples kept out of the measurement, the rung of least loss is found, and the lowest rung whose
loss is within one standard error of that, paired, is taken.  A penalty holds the loss down now and
leaves weights that cost more later, so it is taken only as far as the loss shows.  Source of the
rule: Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lossprune.pruning.apart import change
from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.scoring import Scoring

RUNGS = 9
_UNIT = 2  # the rung of λ_1


@dataclass(frozen=True)
class TriedReg:
    """A λ, and the mean loss on the examples kept out that it leads to; None: it is not finite."""

    reg: float
    loss: float | None


@dataclass(frozen=True)
class ChosenReg:
    """Which λ a stage takes, and how that came about.

    Attributes:
        reg: λ.
        rung: of the ladder.
        saliencies: with it.
        marked: the weights that go with it.
        tried: every λ that was tried, rising.
    """

    reg: float
    rung: int
    saliencies: Mapping[str, Tensor]
    marked: Mapping[str, Tensor]
    tried: tuple[TriedReg, ...]


def choose_reg(
    scoring: Scoring,
    mark: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    mask: Mask,
    apart: Objective,
    rung: int | None,
) -> ChosenReg:
    """Choose the λ of a stage.

    Args:
        scoring: the stage's statistics.
        mark: gives, of saliencies, the weights that go.
        mask: at which they were measured.
        apart: the loss over the examples that are kept out.
        rung: of the stage before; None: this is the first.

    Raises:
        PruningError: the loss is not finite at any λ.
    """
    plain = scoring.saliencies(0.0)
    without = mark(plain)
    unit = _unit(scoring.weights, plain, without)
    rungs = range(RUNGS) if rung is None else range(max(0, rung - 1), min(RUNGS, rung + 2))
    regs = {r: 0.0 if r == 0 else unit * 10 ** ((r - _UNIT) / 2) for r in rungs}
    marks = {r: mark(scoring.penalised(plain, g)) if g else without for r, g in regs.items()}
    losses = {r: _losses(apart, mask, marked) for r, marked in marks.items()}
    finite = {r: found for r, found in losses.items() if found is not None}
    if not finite:
        raise PruningError(
            "the loss on the examples kept out is not finite at any λ that was tried: give reg a "
            "number, or remove less at a stage"
        )
    best = min(finite, key=lambda r: finite[r][0])
    within = {r: change(each, finite[best][1]) for r, (_, each) in finite.items()}
    chosen = min(r for r, found in within.items() if found.mean <= found.error or r == best)
    return ChosenReg(
        regs[chosen],
        chosen,
        scoring.penalised(plain, regs[chosen]),
        marks[chosen],
        tuple(TriedReg(regs[r], found and found[0]) for r, found in losses.items()),
    )


def _unit(
    weights: Mapping[str, Tensor], saliencies: Mapping[str, Tensor], marked: Mapping[str, Tensor]
) -> float:
    """λ_1 of a stage; 1 where what goes without a penalty has nothing to lose."""
    largest, squares, count = 0.0, 0.0, 0
    for name, where in marked.items():
        gone, theta = saliencies[name][where], weights[name].detach()[where]
        if len(gone):
            largest = max(largest, float(gone.max()))
            squares += float((theta.abs().double() ** 2).sum())
            count += len(gone)
    unit = 2 * largest * count / squares if squares else 0.0
    return unit if unit > 0 and math.isfinite(unit) else 1.0


def _losses(
    apart: Objective, mask: Mask, marked: Mapping[str, Tensor]
) -> tuple[float, Tensor] | None:
    """The mean, and of each example; None where it is not finite, as far removals may make it."""
    reached = {name: kept & ~marked[name] for name, kept in mask.items()}
    try:
        statistics, each = apart.measure_each(reached)
    except PruningError:  # the network itself could be measured just before
        return None
    return statistics.loss, each
