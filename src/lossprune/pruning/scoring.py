"""From statistics to saliencies, and to the change of the loss that a criterion predicts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lossprune.pruning.criteria import Criterion
from lossprune.pruning.curvature.statistics import Statistics, check_entries
from lossprune.pruning.errors import PruningError


def saliencies(
    criterion: Criterion,
    weights: Mapping[str, Tensor],
    statistics: Statistics | None,
    reg: float,
    other: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the criterion's saliency + ½ λ θ² of every weight, by parameter name.

    That of a weight which is exactly 0 is −∞, whatever the criterion: it has nothing to lose.

    ``other`` is what the criterion takes in the place of the curvature, if anything.

    Raises:
        PruningError: a saliency is not finite, or not of its parameter's shape (named).
    """
    scores = {}
    for name, weight in weights.items():
        theta, saliency = _evaluated(criterion, "saliency", name, weight, statistics, other)
        saliency = saliency + 0.5 * reg * theta**2
        check_entries("saliency", name, saliency)
        scores[name] = saliency.masked_fill(theta == 0, -torch.inf)
    return scores


def predicted_change(
    criterion: Criterion,
    weights: Mapping[str, Tensor],
    statistics: Statistics | None,
    marked: Mapping[str, Tensor],
    other: Mapping[str, Tensor] | None = None,
) -> float | None:
    """Return the ΔL that the criterion's model predicts for removing the marked weights.

    The penalty is not in it.  None where the criterion does not model the loss.

    Raises:
        PruningError: the change is not of its parameter's shape (named).
    """
    if criterion.change is None:
        return None
    total = 0.0
    for name, weight in weights.items():
        _, change = _evaluated(criterion, "change", name, weight, statistics, other)
        total += float(change[marked[name]].sum(dtype=torch.float64))
    return total


def _evaluated(
    criterion: Criterion,
    what: str,
    name: str,
    weight: Tensor,
    statistics: Statistics | None,
    other: Mapping[str, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """θ of one parameter, |θ| if it is complex, and a formula of it; None for what is unknown."""
    theta = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    theta = theta.abs() if theta.is_complex() else theta
    g = None if statistics is None else statistics.gradient.get(name)
    if other is not None:
        h = other[name]
    else:
        h = None if statistics is None else statistics.ggn_diagonal.get(name)
    got = getattr(criterion, what)(theta, g, h)
    # Broadcasting would hide what a criterion of one's own gets wrong.
    if not isinstance(got, Tensor) or got.shape != theta.shape:
        shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise PruningError(
            f"the {what} of criterion {criterion.name!r} must have the shape of {name!r}, "
            f"{tuple(theta.shape)}, got {shape}"
        )
    return theta, got
