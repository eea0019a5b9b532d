"""What a pruning gives back."""

from dataclasses import dataclass

from lossprune.pruning.mask import Mask


@dataclass(frozen=True)
class StageRecord:
    """What one stage did.  Losses are means over the examples that this stage was measured on.

    Attributes:
        stage: 1 for the first.
        sparsity: after the stage, exactly removed / prunable.
        removed: weights removed so far.
        loss_before: at the mask of the stage before; None without data.
        loss_after: at the mask of this stage, on the same examples; None without data.
        predicted_change: the model's ΔL for the weights this stage removed, without the penalty;
            None where the criterion does not model the loss.
        realised_change: ``loss_after − loss_before``; None without data.
        seconds: wall time of the stage.
    """

    stage: int
    sparsity: float
    removed: int
    loss_before: float | None
    loss_after: float | None
    predicted_change: float | None
    realised_change: float | None
    seconds: float


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
    """

    mask: Mask
    stages: tuple[StageRecord, ...]
    unused: tuple[str, ...] = ()
