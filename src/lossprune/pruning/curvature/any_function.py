"""A loss of which nothing is known but the function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lossprune.pruning.curvature.running import described, run
from lossprune.pruning.errors import PruningError


@dataclass(frozen=True)
class AnyFunction:
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

    def amount(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return 1 for each example: (n,)."""
        return torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return ∂ℓ/∂z: like the outputs."""
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            total = self._values(outputs, targets).sum()
            if not total.requires_grad:
                raise PruningError(f"the loss {self.name} does not depend on the outputs")
            (gradient,) = torch.autograd.grad(total, outputs)
        return gradient

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        """Return none."""
        return ()

    def hessian_factor(self, outputs: Tensor, targets: Any = None) -> NoReturn:
        """Raise, naming the losses that have one."""
        raise PruningError(
            f"the loss {self.name} is a plain function, whose Hessian in the outputs is not known: "
            + (self.instead or f"give one of {', '.join(self.known)} or a lossprune.pruning.Loss")
            + "; or give estimator='empirical-fisher', or a criterion that needs only the gradient"
        )

    def rank(self, outputs: Tensor, targets: Any) -> NoReturn:
        """Raise, naming the losses that have a Hessian."""
        self.hessian_factor(outputs, targets)

    def draw(
        self, outputs: Tensor, targets: Any, count: int, generator: torch.Generator
    ) -> NoReturn:
        """Raise, naming the losses that have a Hessian."""
        self.hessian_factor(outputs, targets)

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
