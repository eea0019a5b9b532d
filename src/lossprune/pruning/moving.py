"""What moves beside the mask: the weights that are left, and running statistics."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.pruning.compensation import CompensationRecord
from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.curvature.network import MaskedNetwork
from lossprune.pruning.curvature.statistics import Statistics
from lossprune.pruning.mask import Mask
from lossprune.pruning.recalibration import batch_norm_statistics
from lossprune.pruning.second_order import compensate
from lossprune.pruning.settings import Pruning


@dataclass(frozen=True)
class Move:
    """What would move after a stage.

    Attributes:
        objective: the loss over the stage's examples, where it has moved.
        values: parameters and buffers by name, as they would be.
        compensation: how the weights got there; None: none was asked for.
    """

    objective: Objective
    values: Mapping[str, Tensor]
    compensation: CompensationRecord | None


class Moving:
    """The network as the stages so far have moved it.

    Args:
        pruning: what is asked for.
        damping: λ of the last compensation, where there was one.
        in_place: whether the module itself gets what moves; else it stays as it is.

    Attributes:
        network: the module with what has moved in the place of its own.
    """

    def __init__(self, pruning: Pruning, damping: float | None, *, in_place: bool) -> None:
        self.network = pruning.network
        self._pruning, self._damping, self._in_place = pruning, damping, in_place

    def proposed(
        self, objective: Objective, mask: Mask, reached: Mask, statistics: Statistics, *, last: bool
    ) -> Move:
        """Return what moves after a stage that ends with a mask; nothing moves yet.

        Running statistics are first: a compensation fits the weights to those that there are.
        ``last`` says that no stage after this one removes weights.
        """
        pruning, values = self._pruning, {}
        if pruning.recalibrate == "stages" or (pruning.recalibrate == "end" and last):
            network = MaskedNetwork(self.network, reached)
            values = dict(
                batch_norm_statistics(network, objective.batches, sharded=pruning.sharded)
            )
            objective = objective.at(self.network.moved_to(values))
            mask = reached  # with other statistics the loss is another, and expanded anew
        if pruning.compensation is None:
            return Move(objective, values, None)
        step = compensate(
            objective,
            mask,
            reached,
            diagonal=statistics.ggn_diagonal,
            settings=pruning.compensation,
            damping=self._damping,
            loss_before=statistics.loss,
            last=last,
        )
        values |= step.values
        return Move(objective.at(self.network.moved_to(values)), values, step.record)

    @torch.no_grad()
    def accept(self, move: Move) -> None:
        """Let it be so."""
        if move.compensation is not None:
            self._damping = move.compensation.damping
        if not self._in_place:
            self.network = self.network.moved_to(move.values)
            return
        model = self._pruning.model
        own = dict((*model.named_parameters(), *model.named_buffers()))
        for name, value in move.values.items():
            own[name].copy_(value)
