"""Loss and error of a network on data of its own, along the path of a pruning; budgets of these."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch, Forward
from lossprune.pruning.curvature.cross_entropy import CrossEntropy
from lossprune.pruning.curvature.elementwise import BinaryCrossEntropy
from lossprune.pruning.curvature.losses import FullLoss
from lossprune.pruning.curvature.network import MaskedNetwork, PrunableNetwork
from lossprune.pruning.curvature.running import evaluating
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask


@dataclass(frozen=True)
class CurvePoint:
    """A mask on the path of a pruning, and what the network does with it on validation data.

    Attributes:
        removed: weights.
        sparsity: exactly removed / prunable.
        loss: the mean.
        error: share of wrong answers; None where the loss is not one of classes.
    """

    removed: int
    sparsity: float
    loss: float
    error: float | None


@dataclass(frozen=True)
class Budget:
    """What a pruning may cost on validation data, beside the network it began from.

    Attributes:
        loss: most by which the mean loss may rise; None: no limit.
        error: most by which the error may rise, in percentage points; None: no limit.

    >>> dense = CurvePoint(0, 0.0, 0.10, 0.015)
    >>> Budget(loss=0.05, error=None).keeps(CurvePoint(8, 0.8, 0.14, 0.020), dense)
    True
    >>> Budget(loss=None, error=0.4).keeps(CurvePoint(8, 0.8, 0.14, 0.020), dense)
    False
    """

    loss: float | None
    error: float | None

    def keeps(self, point: CurvePoint, dense: CurvePoint) -> bool:
        """Whether a mask is within it."""
        within = True
        if self.loss is not None:
            within = point.loss - dense.loss <= self.loss
        if self.error is not None:
            assert point.error is not None  # as it was checked of the dense network
            assert dense.error is not None
            # 0.3 points are 0.3, not 0.30000000000000004, of shares that are counted.
            within = within and round((point.error - dense.error) * 100, 9) <= self.error
        return within


@dataclass(frozen=True)
class Validation:
    """Data to judge masks by.

    Attributes:
        batches: iterated anew for every mask.
        loss: of one example.
        forward: as in :func:`lossprune.prune`.
    """

    batches: Iterable[Any]
    loss: FullLoss
    forward: Forward | None

    def point(self, network: PrunableNetwork, mask: Mask) -> CurvePoint:
        """Return what the network does at θ ⊙ m, in evaluation mode.

        Raises:
            PruningError: there are no examples; the network cannot be run on one; outputs and
                targets are not what the loss takes.
        """
        masked = MaskedNetwork(network, mask)
        with evaluating(network.model), torch.no_grad():
            batches = (Batch.of(given, self.forward).to(network.device) for given in self.batches)
            loss, error, _ = loss_and_error((masked(batch) for batch in batches), self.loss)
        found = torch.tensor([loss, -1.0 if error is None else error], dtype=torch.float64)
        if distributed.processes() > 1:
            distributed.as_the_first_has_([found])  # to the last bit, as it decides
        loss, error = found.tolist()
        return CurvePoint(mask.removed, mask.sparsity, loss, None if error < 0 else error)


def loss_and_error(
    results: Iterable[tuple[Tensor, Any]], loss: FullLoss
) -> tuple[float, float | None, int]:
    """Return mean loss, share of wrong answers and number of examples, of outputs and targets.

    Raises:
        PruningError: there are none.
    """
    asked = getattr(loss, "loss", loss)  # what find_loss has completed
    total = amount = wrong = counted = 0.0
    examples, graded = 0, True
    for outputs, targets in results:
        loss.check(outputs, targets)
        total += float(loss.value(outputs, targets).double().sum())
        amount += float(loss.amount(outputs, targets).double().sum())
        examples += len(outputs)
        answers = _wrong(asked, outputs, targets)
        graded = graded and answers is not None
        if answers is not None:
            wrong, counted = wrong + int(answers.sum()), counted + answers.numel()
    if not amount:
        raise PruningError("the data to judge by hold no examples")
    return total / amount, wrong / counted if graded and counted else None, examples


def _wrong(loss: Any, outputs: Tensor, targets: Any) -> Tensor | None:
    """Which answers are wrong, of those that count; None: the loss is not one of classes."""
    if isinstance(loss, BinaryCrossEntropy):
        return (outputs > 0) != (targets > 0.5)
    if not isinstance(loss, CrossEntropy):
        return None
    answers = outputs.argmax(loss.class_dim)
    if targets.is_floating_point():
        return answers != targets.argmax(loss.class_dim)
    targets = targets.long()  # of uint8, 156 equals −100
    if loss.shift:
        answers, targets = answers[:, : -loss.shift], targets[:, loss.shift :]
    return (answers != targets)[targets != loss.ignore_index]


def curve_of(points: Iterable[CurvePoint]) -> tuple[CurvePoint, ...]:
    """Return the points rising in sparsity, one of each mask."""
    return tuple({point.removed: point for point in sorted(points, key=_removed)}.values())


def _removed(point: CurvePoint) -> int:
    return point.removed
