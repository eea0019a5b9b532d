"""From statistics to saliencies, and to the change of the loss that a criterion predicts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.pruning.criteria import Criterion
from lossprune.pruning.curvature.statistics import Statistics, check_entries
from lossprune.pruning.errors import PruningError

_CHUNK = 1 << 18  # numbers that are summed at once: their copies stay in the cache


@dataclass(frozen=True)
class Scoring:
    """A criterion's formulas of a stage's weights.

    Attributes:
        statistics: None where nothing was measured.
        other: what the criterion takes in the place of the curvature, if anything.
    """

    criterion: Criterion
    weights: Mapping[str, Tensor]
    statistics: Statistics | None
    other: Mapping[str, Tensor] | None

    def saliencies(self, reg: float) -> dict[str, Tensor]:
        """Return the criterion's saliency + ½ λ θ² of every weight, by parameter name.

        That of a weight which is exactly 0 is −∞, whatever the criterion: it has nothing to lose.

        Raises:
            PruningError: a saliency is not finite, or not of its parameter's shape (named).
        """
        scores = {}
        for name in self.weights:
            theta, saliency = self._evaluated("saliency", name)
            saliency = _penalised(saliency, reg, theta)
            check_entries("saliency", name, saliency)
            if int(theta.count_nonzero()) < theta.numel():
                saliency = saliency.masked_fill(theta == 0, -torch.inf)
            scores[name] = saliency
        return scores

    def penalised(self, plain: Mapping[str, Tensor], reg: float) -> dict[str, Tensor]:
        """Return the saliencies with a penalty, from those without."""
        return {
            name: _penalised(saliency, reg, self._theta(name)) for name, saliency in plain.items()
        }

    def predicted_change(self, marked: Mapping[str, Tensor]) -> float | None:
        """Return the ΔL that the criterion's model predicts for removing the marked weights.

        The penalty is not in it.  None where the criterion does not model the loss.

        Raises:
            PruningError: the change is not of its parameter's shape (named).
        """
        if self.criterion.change is None:
            return None
        total = 0.0
        for name in self.weights:
            _, change = self._evaluated("change", name)
            total += _sum_where(marked[name], change)
        return total

    def _evaluated(self, what: str, name: str) -> tuple[Tensor, Tensor]:
        """θ of one parameter (|θ| if complex), and a formula of it; None for what is unknown."""
        theta, statistics = self._theta(name), self.statistics
        g = None if statistics is None else statistics.gradient.get(name)
        if self.other is not None:
            h = self.other[name]
        else:
            h = None if statistics is None else statistics.ggn_diagonal.get(name)
        got = getattr(self.criterion, what)(theta, g, h)
        # Broadcasting would hide what a criterion of one's own gets wrong.
        if not isinstance(got, Tensor) or got.shape != theta.shape:
            shape = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise PruningError(
                f"the {what} of criterion {self.criterion.name!r} must have the shape of {name!r}, "
                f"{tuple(theta.shape)}, got {shape}"
            )
        return theta, got

    def _theta(self, name: str) -> Tensor:
        weight = self.weights[name]
        theta = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return theta.abs() if theta.is_complex() else theta


def _penalised(saliency: Tensor, reg: float, theta: Tensor) -> Tensor:
    """Saliency + ½ λ θ², in the wider of their types."""
    if reg == 0:
        return saliency.to(torch.promote_types(saliency.dtype, theta.dtype))
    penalty = theta.square().mul_(0.5 * reg)
    return penalty.add_(saliency) if saliency.dtype == penalty.dtype else penalty + saliency


def _sum_where(marked: Tensor, change: Tensor) -> float:
    """Σ of the marked entries, in double precision."""
    chunks = zip(change.flatten().split(_CHUNK), marked.flatten().split(_CHUNK), strict=True)
    total = sum(float((some * gone).sum(dtype=torch.float64)) for some, gone in chunks)
    # What is not marked may be infinite in a formula of one's own, and then is no 0 in a product.
    return total if math.isfinite(total) else float(change[marked].sum(dtype=torch.float64))
