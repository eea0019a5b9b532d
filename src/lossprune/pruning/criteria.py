"""What a weight is worth: the loss models and their saliencies.

With the weights θ, the gradient g = ∇L(θ), the diagonal h of the generalised Gauss-Newton matrix
and the step δ = −θ of removing a weight, a model of the loss predicts the change ΔL of removing
each weight alone.  A saliency is what pruning ranks by: weights with the smallest are removed.

Source: Laurent et al., "Revisiting Loss Modelling for Unstructured Pruning", 2020; for OBD, LeCun,
Denker and Solla, "Optimal Brain Damage", NIPS 1989.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A saliency, elementwise in the weight θ, gradient g and curvature h of one parameter.

    Attributes:
        name: what records and masks call it.
        saliency: ``saliency(theta, g, h)``, a tensor of θ's shape; smallest is removed first.
            The step-size penalty ½ λ θ² is added by :func:`lossprune.prune`, not here.
        change: ``change(theta, g, h)``, the signed ΔL that the loss model predicts for removing
            each weight; None where there is no model of the loss.
        gradient: whether g is needed; where not, the formulas get None for it.
        curvature: whether h is needed; where not, the formulas get None for it.
        description: one line for help texts and tables.

    >>> import lossprune, torch
    >>> double = lossprune.Criterion("|gθ|²", lambda theta, g, h: (g * theta) ** 2, gradient=True)
    >>> double.saliency(torch.tensor([2.0]), torch.tensor([0.5]), None)
    tensor([1.])
    """

    name: str
    saliency: Formula
    change: Formula | None = None
    gradient: bool = False
    curvature: bool = False
    description: str = ""


CRITERIA: dict[str, Criterion] = {
    "MP": Criterion(
        "MP",
        saliency=lambda theta, g, h: 0.5 * theta**2,
        description="magnitude: ½ θ²",
    ),
    "LM": Criterion(
        "LM",
        saliency=lambda theta, g, h: (g * theta).abs(),
        change=lambda theta, g, h: -g * theta,
        gradient=True,
        description="linear model of the loss: |g θ|",
    ),
    "QM": Criterion(
        "QM",
        saliency=lambda theta, g, h: (-g * theta + 0.5 * h * theta**2).abs(),
        change=lambda theta, g, h: -g * theta + 0.5 * h * theta**2,
        gradient=True,
        curvature=True,
        description="quadratic model of the loss: |−g θ + ½ h θ²|",
    ),
    "OBD": Criterion(
        "OBD",
        saliency=lambda theta, g, h: 0.5 * h * theta**2,
        change=lambda theta, g, h: 0.5 * h * theta**2,
        curvature=True,
        description="Optimal Brain Damage: ½ h θ²",
    ),
}


def find_criterion(criterion: str | Criterion) -> Criterion:
    """Return the criterion of that name, or the criterion given.

    Raises:
        ValueError: a name that is not in :data:`CRITERIA`.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(
            f"unknown criterion {criterion!r}; choose one of: {', '.join(CRITERIA)}, "
            "or give a lossprune.Criterion"
        )
    return CRITERIA[criterion]
