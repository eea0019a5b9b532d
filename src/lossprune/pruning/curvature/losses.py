"""Loss functions, as the curvature estimate sees them.

With the outputs z of one example, a loss ℓ(z, t) gives its value, its gradient ∂ℓ/∂z and a factor
S of its Hessian in the outputs, S Sᵀ = ∂²ℓ/∂z².  L is the mean of ℓ over the examples, or where a
loss says how much each example counts, Σ ℓ divided by the sum of that.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lossprune.pruning.curvature.any_function import AnyFunction
from lossprune.pruning.curvature.cross_entropy import CrossEntropy
from lossprune.pruning.curvature.elementwise import BinaryCrossEntropy, MeanSquaredError
from lossprune.pruning.names import find_in


class Loss(Protocol):
    """What a loss of one's own must offer; n examples, k columns of the factor."""

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Raise a :class:`PruningError` that says how outputs and targets do not fit."""
        ...

    def value(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return ℓ of each example: (n,)."""
        ...

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return ∂ℓ/∂z: like the outputs."""
        ...

    def hessian_factor(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return S of each example: (k, *outputs), with Σ_k S[k, n, c] S[k, n, d] = ∂²ℓ_n/∂z_c∂z_d.

        A loss whose Hessian does not depend on the targets may take the outputs alone.
        """
        ...


class FullLoss(Loss, Protocol):
    """What measuring uses; :func:`find_loss` adds what a :class:`Loss` lacks."""

    def amount(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return how much each example counts in the mean: (n,)."""
        ...

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the dimensions of the outputs between whose indices ∂²ℓ/∂z² has no entries.

        There each vector of the factor holds one column for every index (see ``columns.py``).
        """
        ...

    def rank(self, outputs: Tensor, targets: Any) -> int:
        """Return how many columns the factor has, of the example with most: all positions' ones."""
        ...

    def draw(self, outputs: Tensor, targets: Any, count: int, generator: torch.Generator) -> Tensor:
        """Return vectors drawn with mean 0 and covariance ∂²ℓ/∂z²: (n, count, *outputs)."""
        ...


LOSSES: dict[str, Loss] = {
    "cross_entropy": CrossEntropy(),
    "token_cross_entropy": CrossEntropy(class_dim=-1),
    "next_token": CrossEntropy(class_dim=-1, shift=1),
    "mse": MeanSquaredError(),
    "bce_with_logits": BinaryCrossEntropy(),
}

LossFunction = Callable[[Tensor, Any], Tensor]


def find_loss(loss: "str | Loss | LossFunction") -> FullLoss:
    """Return the loss of that name, or the loss given.

    torch's own cross-entropy, squared error and binary cross-entropy with logits, functions or
    modules with ``reduction="mean"``, are taken for the losses here that compute the same; any
    other function for one of which only values and gradients are known.

    Raises:
        ValueError: a name that is not in :data:`LOSSES`, or no loss at all.

    >>> find_loss(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
    CrossEntropy(weight=None, label_smoothing=0.1, ignore_index=-100, class_dim=1, shift=0)
    """
    if isinstance(loss, str):
        loss = find_in(LOSSES, loss, "loss")
    elif (known := _known(loss)) is not None:
        loss = known
    if hasattr(loss, "hessian_factor"):
        return _Complete(cast(Loss, loss)) if _lacks(loss) else cast(FullLoss, loss)
    if not callable(loss):
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)}, a lossprune.pruning.Loss or a function of "
            f"(outputs, targets), got {loss!r}"
        )
    return cast(FullLoss, AnyFunction(loss, tuple(LOSSES), _same_on_logits(loss)))


def _known(loss: Any) -> Loss | None:
    """What torch calls by another name."""
    if isinstance(loss, nn.Module) and getattr(loss, "reduction", None) != "mean":
        return None
    # Their subclasses may compute something else.
    if loss is F.cross_entropy or loss is F.mse_loss or loss is F.binary_cross_entropy_with_logits:
        names = {F.cross_entropy: "cross_entropy", F.mse_loss: "mse"}
        return LOSSES[names.get(loss, "bce_with_logits")]
    if type(loss) is nn.CrossEntropyLoss:
        return CrossEntropy(loss.weight, loss.label_smoothing, loss.ignore_index)
    if type(loss) is nn.MSELoss:
        return MeanSquaredError()
    if type(loss) is nn.BCEWithLogitsLoss:
        return BinaryCrossEntropy(loss.weight, loss.pos_weight)
    return None


def _same_on_logits(loss: Any) -> str:
    """What to give instead of one of torch's losses on (log-)probabilities, if it is one."""
    if loss is F.nll_loss or type(loss) is nn.NLLLoss:
        if getattr(loss, "weight", None) is not None and loss.reduction == "mean":
            raise ValueError(  # the function is called on one example at a time
                "loss NLLLoss divides by its weight, so that on one example it has none: give "
                "nn.CrossEntropyLoss with the same weight, which is the same on log-probabilities"
            )
        return (
            "on a network that ends in log_softmax loss='cross_entropy', or nn.CrossEntropyLoss "
            "with the same arguments, has the same value, gradient and curvature"
        )
    if loss is F.binary_cross_entropy or type(loss) is nn.BCELoss:
        return "on the network without its last sigmoid loss='bce_with_logits' is the same"
    return ""


def _lacks(loss: Any) -> bool:
    return not all(hasattr(loss, method) for method in ("amount", "positions", "rank", "draw"))


@dataclass(frozen=True)
class _Complete:
    """A loss of the four methods that :class:`Loss` names, with the others made from them."""

    loss: Loss

    def check(self, outputs: Tensor, targets: Any) -> None:
        self.loss.check(outputs, targets)

    def value(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.loss.value(outputs, targets)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.loss.gradient(outputs, targets)

    def hessian_factor(self, outputs: Tensor, targets: Any) -> Tensor:
        factor: Callable[..., Tensor] = self.loss.hessian_factor
        if len(inspect.signature(factor).parameters) == 1:
            return factor(outputs)
        return factor(outputs, targets)

    def amount(self, outputs: Tensor, targets: Any) -> Tensor:
        if hasattr(self.loss, "amount"):
            return cast(FullLoss, self.loss).amount(outputs, targets)
        return torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        if hasattr(self.loss, "positions"):
            return cast(FullLoss, self.loss).positions(outputs)
        return ()

    def rank(self, outputs: Tensor, targets: Any) -> int:
        if hasattr(self.loss, "rank"):
            return cast(FullLoss, self.loss).rank(outputs, targets)
        places = (outputs.shape[dimension] for dimension in self.positions(outputs))
        return len(self.hessian_factor(outputs, targets)) * math.prod(places)

    def draw(self, outputs: Tensor, targets: Any, count: int, generator: torch.Generator) -> Tensor:
        """Sums of the factor's columns with random signs, unless the loss draws its own."""
        if hasattr(self.loss, "draw"):
            return cast(FullLoss, self.loss).draw(outputs, targets, count, generator)
        factor = self.hessian_factor(outputs, targets)
        shape = (len(outputs), count, len(factor))
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return torch.einsum("knd,nmk->nmd", factor.flatten(2), signs.to(factor)).view(
            len(outputs), count, *outputs.shape[1:]
        )
