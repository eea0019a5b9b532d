"""Loss functions, as the curvature estimate sees them.

With the outputs z of one example, a loss ℓ(z, t) gives its value, its gradient ∂ℓ/∂z and a factor
S of its Hessian in the outputs, S Sᵀ = ∂²ℓ/∂z².  L is the mean of ℓ over the examples, or where a
loss says how much each example counts, Σ ℓ divided by the sum of that.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lossprune.pruning.curvature.cross_entropy import CrossEntropy
from lossprune.pruning.curvature.elementwise import BinaryCrossEntropy, MeanSquaredError
from lossprune.pruning.curvature.running import described, run
from lossprune.pruning.errors import PruningError
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
    """What measuring uses: a :class:`Loss`, and more that can be made from it as here."""

    def amount(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return how much each example counts in the mean: (n,)."""
        return torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the dimensions of the outputs between whose indices ∂²ℓ/∂z² has no entries.

        There each vector of the factor holds one column for every index (see ``columns.py``).
        """
        return ()

    def rank(self, outputs: Tensor, targets: Any) -> int:
        """Return how many columns the factor has, of the example with most: all positions' ones."""
        places = (outputs.shape[dimension] for dimension in self.positions(outputs))
        return len(self.hessian_factor(outputs, targets)) * math.prod(places)

    def hessian_product(self, outputs: Tensor, targets: Any, vectors: Tensor) -> Tensor:
        """Return ∂²ℓ/∂z² u of each example, for vectors u like the outputs: S Sᵀ u."""
        factor = self.hessian_factor(outputs, targets)
        apart = self.positions(outputs)
        mixed = [1 + d for d in range(1, outputs.ndim) if d not in apart]
        along = factor * vectors
        if mixed:
            along = along.sum(mixed, keepdim=True)
        return (factor * along).sum(0)

    def draw(self, outputs: Tensor, targets: Any, count: int, generator: torch.Generator) -> Tensor:
        """Return vectors drawn with mean 0 and covariance ∂²ℓ/∂z²: (n, count, *outputs).

        They are sums of the factor's columns with random signs.
        """
        factor = self.hessian_factor(outputs, targets)
        shape = (len(outputs), count, len(factor))
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return torch.einsum("knd,nmk->nmd", factor.flatten(2), signs.to(factor)).view(
            len(outputs), count, *outputs.shape[1:]
        )


_MADE = (
    "amount",
    "positions",
    "rank",
    "hessian_product",
    "draw",
)  # by FullLoss, where a loss has none of its own


@dataclass(frozen=True)
class _Complete(FullLoss):
    """A loss with what it lacks; what it has of this is its own."""

    loss: Loss

    def __post_init__(self) -> None:
        own = {name: getattr(self.loss, name) for name in _MADE if hasattr(self.loss, name)}
        vars(self).update(own)

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


@dataclass(frozen=True)
class AnyFunction(FullLoss):
    """Any differentiable function of (outputs, targets), whose derivatives autograd gives.

    A function that returns one number per example gives ℓ of each.  One that returns a single
    number is called on one example at a time, so that L is the mean over examples of what it
    returns, however they come in batches.

    Its Hessian in the outputs is not known, so of the curvature only the empirical Fisher is to be
    had.

    Attributes:
        function: ``function(outputs, targets)``.
        known: names of the losses whose Hessian is known, for the error.
        instead: which of them is the same, for the error, if any is.
    """

    function: Callable[[Tensor, Any], Tensor]
    known: tuple[str, ...] = ()
    instead: str = ""

    def check(self, outputs: Tensor, targets: Any) -> None:
        """Do nothing: what does not fit, the function itself will say."""

    def value(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return ℓ of each example: (n,)."""
        return self._values(outputs, targets)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return ∂ℓ/∂z: like the outputs."""
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            total = self._values(outputs, targets).sum()
            if not total.requires_grad:
                raise PruningError(f"the loss {self.name} does not depend on the outputs")
            (gradient,) = torch.autograd.grad(total, outputs)
        return gradient

    def hessian_factor(self, outputs: Tensor, targets: Any = None) -> NoReturn:
        """Raise, naming the losses that have one."""
        raise PruningError(
            f"the loss {self.name} is a plain function, whose Hessian in the outputs is not known: "
            + (self.instead or f"give one of {', '.join(self.known)} or a lossprune.pruning.Loss")
            + "; or give estimator='empirical-fisher', or a criterion that needs only the gradient"
        )

    @property
    def name(self) -> str:
        """What errors call it."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def _values(self, outputs: Tensor, targets: Any) -> Tensor:
        values = self._call(outputs, targets)
        if values.shape == outputs.shape[:1]:
            return values
        if values.numel() != 1:
            raise PruningError(
                f"the loss {self.name} must return one number per example, ({len(outputs)},), or "
                f"a single one, got shape {tuple(values.shape)}"
            )
        if len(outputs) == 1:
            return values.reshape(1)
        return torch.stack(
            [
                self._call(
                    outputs[n : n + 1],
                    tree_map_only(Tensor, lambda tensor, n=n: tensor[n : n + 1], targets),
                ).reshape(())
                for n in range(len(outputs))
            ]
        )

    def _call(self, outputs: Tensor, targets: Any) -> Tensor:
        values = run(
            f"the loss {self.name} could not be computed of {described((outputs, targets))}",
            lambda: self.function(outputs, targets),
            lambda text: "loss=lambda outputs, targets: ... can fit one to the other",
        )
        if not isinstance(values, Tensor):
            raise PruningError(
                f"the loss {self.name} must return a tensor, got {type(values).__name__}"
            )
        return values


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
        full = all(hasattr(loss, name) for name in _MADE)
        return cast(FullLoss, loss) if full else _Complete(cast(Loss, loss))
    if not callable(loss):
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)}, a lossprune.pruning.Loss or a function of "
            f"(outputs, targets), got {loss!r}"
        )
    return AnyFunction(loss, tuple(LOSSES), _same_on_logits(loss))


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
