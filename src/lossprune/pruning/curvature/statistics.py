"""What is measured of a network on examples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lossprune.pruning.errors import PruningError


@dataclass(frozen=True)
class Statistics:
    """What was measured, over ``examples`` examples.

    Attributes:
        loss: mean loss; over examples, or over what the loss counts (see the loss).
        gradient: ∂L/∂θ by parameter name; empty if not asked for.
        ggn_diagonal: diag(G) by parameter name; empty if not asked for.  What a mask removes is
            measured or not, as it falls: nothing is said of it.
        examples: how many examples the means are over.
        skipped: share of the output Hessian's trace that the estimator left out.
        unused: names of the weights that the outputs of no example depend on in evaluation mode,
            by the graph (a layer behind a ReLU that is shut is not among them); none where the
            outputs depend on no weight at all.
    """

    loss: float
    gradient: Mapping[str, Tensor]
    ggn_diagonal: Mapping[str, Tensor]
    examples: int
    skipped: float = 0.0
    unused: tuple[str, ...] = ()


def check_finite(statistics: Statistics) -> None:
    """Raise unless loss, gradient and curvature are finite; what is not is named."""
    if not math.isfinite(statistics.loss):
        raise PruningError(f"the loss is not finite ({statistics.loss})")
    measured = {"gradient": statistics.gradient, "curvature": statistics.ggn_diagonal}
    for what, tensors in measured.items():
        for name, tensor in tensors.items():
            bad = tensor.numel() - int(tensor.isfinite().sum())
            if bad:
                raise PruningError(
                    f"the {what} of {name!r} is not finite in {bad} of {tensor.numel()} entries"
                )
