"""What a pruning comes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lossprune.pruning.mask import Mask
from lossprune.pruning.names import listed
from lossprune.pruning.skipped import Skipped
from lossprune.pruning.stages import MOST_NAMED, StageRecord


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
    """

    mask: Mask
    stages: tuple[StageRecord, ...]
    unused: tuple[str, ...] = ()
    skipped: Mapping[str, Skipped] = field(default_factory=dict)
    model_parameters: int = 0

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
        if self.stages and self.stages[0].loss_before is not None:
            before, after = self.stages[0].loss_before, self.stages[-1].loss_after
            parts.append(f"loss {before:.5g} before, {after:.5g} after")
        if self.unused:
            parts.append(f"unused: {listed(self.unused, MOST_NAMED)}")
        return f"PruningResult({', '.join(parts)})"
