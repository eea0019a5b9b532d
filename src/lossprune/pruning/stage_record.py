"""What one stage did."""

from dataclasses import dataclass

from lossprune.pruning.compensation import CompensationRecord
from lossprune.pruning.ladder import TriedReg
from lossprune.pruning.validation import CurvePoint


@dataclass(frozen=True)
class TakenBack:
    """A size of a stage at which the model was found to be too far off.

    Attributes:
        sparsity: that the stage would have ended with, or the share of the cost that is gone
            where a share is asked for.
        predicted_change: the model's ΔL.
        realised_change: what it would have been; None where the loss is not finite.
    """

    sparsity: float
    predicted_change: float
    realised_change: float | None


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
        compensation: how the weights that are left moved, before ``loss_after``; None where that
            is not asked for.
        reg: the λ that was chosen; None where it was given.
        rung: of the ladder that it stands on.
        tried: every λ that was tried, and its loss on the examples kept out; None: none was.
        taken_back: sizes of the stage that were tried before it; None where stages do not follow
            the model.
        points: masks that were judged on validation data, in the order of their sparsity; the
            first stage's begin with the network before it.  None without validation data.
        cost: the share of the cost that is left, where a share is asked for; None where not.
    """

    stage: int
    sparsity: float
    removed: int
    loss_before: float | None
    loss_after: float | None
    predicted_change: float | None
    realised_change: float | None
    seconds: float
    compensation: CompensationRecord | None = None
    reg: float | None = None
    rung: int | None = None
    tried: tuple[TriedReg, ...] | None = None
    taken_back: tuple[TakenBack, ...] | None = None
    points: tuple[CurvePoint, ...] | None = None
    cost: float | None = None

    @property
    def gone(self) -> float:
        """κ, as the stages go by it: the share that is gone of the cost, or of the weights."""
        return self.sparsity if self.cost is None else 1 - self.cost

    def __repr__(self) -> str:
        parts = [f"sparsity {self.sparsity:.5g}", f"{self.removed:,} removed"]
        if self.cost is not None:
            parts.append(f"{100 * self.cost:.4g} % of the cost left")
        if self.loss_before is not None:
            parts.append(f"loss {self.loss_before:.5g} before, {self.loss_after:.5g} after")
        if self.predicted_change is not None:
            parts.append(f"change {self.predicted_change:.3g} predicted")
        if self.reg is not None:
            parts.append(f"λ {self.reg:.3g}")
        if self.compensation is not None:
            parts.append(f"{self.compensation.loss_without:.5g} without compensation")
        return f"StageRecord(stage {self.stage}, {', '.join(parts)}, {self.seconds:.3g} s)"
