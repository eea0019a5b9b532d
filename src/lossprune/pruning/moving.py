"""What moves beside the mask: the weights that are left, and running statistics."""

from collections.abc import Mapping

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

    def move(
        self, objective: Objective, mask: Mask, reached: Mask, statistics: Statistics, stage: int
    ) -> tuple[Objective, CompensationRecord | None]:
        """Move what is asked for after a stage; return the loss as it is now over its examples.

        Running statistics are first: a compensation fits the weights to those that there are.
        """
        pruning = self._pruning
        settings = pruning.compensation
        last = len(pruning.steps) - (settings.finish if settings else 0)
        if pruning.recalibrate == "stages" or (pruning.recalibrate == "end" and stage == last):
            network = MaskedNetwork(self.network, reached)
            self._move(batch_norm_statistics(network, objective.batches, sharded=pruning.sharded))
            objective = objective.at(self.network)
            mask = reached  # with other statistics the loss is another, and expanded anew
        if settings is None:
            return objective, None
        step = compensate(
            objective,
            mask,
            reached,
            diagonal=statistics.ggn_diagonal,
            settings=settings,
            damping=self._damping,
            loss_before=statistics.loss,
            last=stage >= last,
        )
        self._damping = step.record.damping
        self._move(step.values)
        return objective.at(self.network), step.record

    @torch.no_grad()
    def _move(self, values: Mapping[str, Tensor]) -> None:
        """Let parameters and buffers, by name, have these values."""
        if not self._in_place:
            self.network = self.network.moved_to(values)
            return
        model = self._pruning.model
        own = dict((*model.named_parameters(), *model.named_buffers()))
        for name, value in values.items():
            own[name].copy_(value)
