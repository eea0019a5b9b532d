"""Masks judged on validation data: the curve of a pruning, and where its budget is spent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lossprune.pruning.curvature.examples import take
from lossprune.pruning.curvature.losses import find_loss
from lossprune.pruning.errors import PruningError
from lossprune.pruning.settings import Pruning
from lossprune.pruning.strides import SHORTEST, stride
from lossprune.pruning.trial import Attempt, Trial
from lossprune.pruning.validation import CurvePoint, Validation

# A budget is spent to within so much of all that there is to remove.
_RESOLUTION = 10_000
# A stage that breaks the budget is cut to it where its stride is no longer than this, else halved.
_SHORT = 2 * SHORTEST


@dataclass(eq=False)
class Judge:
    """What judges the stages of a pruning.

    Attributes:
        pruning: what is asked for.
        validation: the data; None: stages are not judged.
        dense: the network before the first stage; None: not judged yet.
        spent: whether the budget is: of a stage that breaks it, not even the shortest one is left.
    """

    pruning: Pruning
    validation: Validation | None
    dense: CurvePoint | None = None
    spent: bool = field(default=False)

    @classmethod
    def of(cls, pruning: Pruning, points: Sequence[CurvePoint]) -> "Judge":
        """Return the judge of a pruning, of which these points are known."""
        batches, budget = pruning.validation, pruning.budget
        if batches is None and budget is not None:
            assert pruning.data is not None
            # The same for every mask, whatever the loader draws.
            taken = take(pruning.data, pruning.examples, pruning.forward)
            batches = [batch.value for batch in taken]
        if batches is None:
            return cls(pruning, None)
        dense = points[0] if points else None
        judge = cls(pruning, Validation(batches, find_loss(pruning.loss), pruning.forward), dense)
        if budget is not None and dense is not None:
            judge.spent = not all(budget.keeps(point, dense) for point in points)
        return judge

    def judged(
        self, trial: Trial, attempt: Attempt
    ) -> tuple[Attempt, tuple[CurvePoint, ...] | None]:
        """Judge a stage; return it, or as much of it as the budget takes, and the points.

        They are of masks on the way of the pruning, and where it ends here of those beyond as well.

        Raises:
            PruningError: there is a budget of the error, and the loss is not one of classes.
        """
        if self.validation is None:
            return attempt, None
        points = []
        if self.dense is None:
            self.dense = self._point(trial, None)
            points.append(self.dense)
            self._check(self.dense)
        kept = self._short_enough(trial, attempt, points)
        if self._breaks(points[-1]):
            kept = self._cut(trial, kept, points)
        self.spent = kept is not attempt and self._stride(trial, kept) < SHORTEST
        on_the_way = [p for p in points if self.spent or p.removed <= kept.reached.removed]
        return kept, tuple(sorted(on_the_way, key=lambda point: point.removed))

    def _short_enough(self, trial: Trial, attempt: Attempt, points: list[CurvePoint]) -> Attempt:
        """Return a stage, or the longest half of a half of it that is within the budget.

        What is left of the budget is for statistics measured there.  Of a short one, the stage.
        """
        points.append(self._point(trial, attempt))
        while self._breaks(points[-1]) and (tried := self._stride(trial, attempt)) > _SHORT:
            left = (1 - self.pruning.selection.gone(trial.mask)) * math.exp(-tried / 2)
            attempt = trial.removing(min(trial.amount(1 - left), attempt.amount - 1))
            points.append(self._point(trial, attempt))
        return attempt

    def _cut(self, trial: Trial, attempt: Attempt, points: list[CurvePoint]) -> Attempt:
        """Return the most of a stage that is within the budget."""
        kept, low, high = trial.removing(0), 0, attempt.amount
        finest = max(1, self.pruning.selection.whole // _RESOLUTION)
        while high - low > finest:
            tried = trial.removing((low + high) // 2)
            points.append(self._point(trial, tried))
            if self._breaks(points[-1]):
                high = tried.amount
            else:
                kept, low = tried, tried.amount
        return kept

    def _breaks(self, point: CurvePoint) -> bool:
        budget = self.pruning.budget
        assert self.dense is not None
        return budget is not None and not budget.keeps(point, self.dense)

    def _stride(self, trial: Trial, attempt: Attempt) -> float:
        gone = self.pruning.selection.gone
        return stride(gone(trial.mask), gone(attempt.reached))

    def _point(self, trial: Trial, attempt: Attempt | None) -> CurvePoint:
        assert self.validation is not None
        if attempt is None:
            return self.validation.point(trial.moving.network, trial.mask)
        network = trial.moving.network.moved_to(attempt.move.values)
        return self.validation.point(network, attempt.reached)

    def _check(self, dense: CurvePoint) -> None:
        if self.pruning.max_error_increase is not None and dense.error is None:
            raise PruningError(
                f"max_error_increase={self.pruning.max_error_increase} is of an error rate, which "
                "this loss has none of: give max_loss_increase"
            )
