"""What a pruning comes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lossprune.pruning.costs import Cost
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.names import listed, look_up
from lossprune.pruning.skipped import Skipped
from lossprune.pruning.stages import MOST_NAMED, StageRecord
from lossprune.pruning.validation import CurvePoint, curve_of


@dataclass(frozen=True)
class PruningResult:
    """A mask, and how it came about stage by stage.

    Attributes:
        mask: which weights are kept.
        stages: one record each.
        unused: names of the prunable weights that the outputs of the first stage's examples do not
            depend on in evaluation mode, by the graph, such as those of a head that is used in
            training only.  They count in the sparsity, and criteria that look at the loss remove
            them first.  Empty without data, as only a forward pass shows it.
        skipped: the parameters that are not pruned, by name, without biases: what kind each is,
            its shape and size.
        model_parameters: numbers in all parameters of the network.
        weights: parameters that a compensation moved, by name, 0 where removed; empty without.
        buffers: running statistics that were estimated anew, by name; empty without.
        cost: what is left of the multiply-adds, where they were counted; None where not.
    """

    mask: Mask
    stages: tuple[StageRecord, ...]
    unused: tuple[str, ...] = ()
    skipped: Mapping[str, Skipped] = field(default_factory=dict)
    model_parameters: int = 0
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    cost: Cost | None = None

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> nn.Module:
        """Give ``model`` what the pruning came to, in place, and return it.

        Moved weights and running statistics take the place of its own, and removed weights are set
        to exactly 0; without compensation and recalibration that is ``mask.apply_``.

        Raises:
            PruningError: as :meth:`Mask.apply_`, or ``model`` has no such parameter or buffer, or
                of another shape; nothing is changed then.
        """
        if problems := self.mask.mismatches(model):
            raise PruningError(f"the result does not fit the network: {'; '.join(problems)}")
        own = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        given = {**self.weights, **self.buffers}
        places: list[tuple[Tensor, Tensor]] = []
        for name, found in look_up(given, own).items():
            if found is None or own[found].shape != given[name].shape:
                raise PruningError(
                    f"the result does not fit the network: it has {name!r} of shape "
                    f"{tuple(given[name].shape)}, which {type(model).__name__} lacks"
                )
            places.append((own[found], given[name]))
        for place, value in places:
            place.copy_(value)
        return self.mask.apply_(model)

    @property
    def curve(self) -> tuple[CurvePoint, ...]:
        """What the network does on validation data from mask to mask, rising in sparsity.

        Each mask removes what the one before it does, and more; the first point is the network
        before the pruning.  Empty without validation data and budget.
        """
        return curve_of(point for stage in self.stages for point in stage.points or ())

    @property
    def model_sparsity(self) -> float:
        """The fraction of all the network's parameters that the mask removes."""
        return self.mask.removed / max(self.model_parameters, 1)

    def __repr__(self) -> str:
        count, mask = len(self.stages), self.mask
        parts = [
            f"{mask.criterion}, {count} {'stage' if count == 1 else 'stages'}",
            f"sparsity {mask.sparsity:.5g}, {mask.removed:,} of {mask.total:,} weights removed",
        ]
        if self.skipped:
            share = f"{self.model_sparsity:.5g} of all {self.model_parameters:,} parameters"
            parts.append(share)
        if self.cost is not None:
            parts.append(self.cost.told())
        if self.stages and self.stages[0].loss_before is not None:
            before, after = self.stages[0].loss_before, self.stages[-1].loss_after
            parts.append(f"loss {before:.5g} before, {after:.5g} after")
        if self.weights or self.buffers:
            parts.append(f"{len(self.weights) + len(self.buffers)} tensors moved, for apply_")
        if self.unused:
            parts.append(f"unused: {listed(self.unused, MOST_NAMED)}")
        return f"PruningResult({', '.join(parts)})"
