"""Estimators of the GGN diagonal: which columns are sent backwards through the network.

Each is a choice of columns S_k, vectors in the outputs of each example, with Σ_k S_k S_kᵀ equal to
the output Hessian H, or near it; the measured diagonal is the mean over examples of Σ_k (Jᵀ S_k)².
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from lossprune.pruning.curvature.columns import Columns
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import find_in

if TYPE_CHECKING:  # so that the names can be listed without torch
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from lossprune.pruning.curvature.losses import FullLoss


# Ten times what a network of ImageNet's thousand classes takes.  More are many classes at many
# positions, tokens or pixels: drawn labels say as much of them in far fewer passes.
MOST_PASSES = 10_000


class Estimator(Protocol):
    """What an estimator must offer.

    Attributes:
        packs: whether it uses different numbers of columns for different examples, which
            :func:`lossprune.measure` then sorts, so that unused columns cost nothing.
    """

    packs: bool

    def columns(
        self, outputs: Tensor, targets: Any, loss: FullLoss, generator: torch.Generator
    ) -> Columns:
        """Return the columns of examples with these outputs and targets."""
        ...


@dataclass(frozen=True)
class Exact:
    """All columns of a factor of H: diag(G) to rounding, in rank(H) backward passes.

    Attributes:
        most: how many backward passes an example may take; where it would take more, that is
            refused with their number before it begins.
    """

    most: int = MOST_PASSES
    packs = False

    def __post_init__(self) -> None:
        _check_most(self.most)

    def columns(
        self, outputs: Tensor, targets: Any, loss: FullLoss, generator: torch.Generator
    ) -> Columns:
        """Return the factor's columns."""
        _check_passes(self, outputs, targets, loss)
        return Columns(
            loss.hessian_factor(outputs, targets).transpose(0, 1), loss.positions(outputs)
        )


@dataclass(frozen=True)
class Tolerance:
    """The columns of H's eigenfactor √λ_k v_k, but for those with the smallest eigenvalues.

    Over all examples measured together, the smallest are skipped as long as what they sum to
    stays within ``tolerance`` of the sum of all the traces; the share that was skipped is
    reported.  Networks that fit their data are confident, and few columns carry nearly all of the
    trace.  The estimate is never above the exact diagonal, and below it by the skipped columns.

    ``most`` is that of :class:`Exact`, and counts the columns from which those are chosen.

    Source: this project; the eigenfactor as in Martens, "New insights and perspectives on the
    natural gradient method", 2020, section 9.
    """

    tolerance: float = 1e-3
    most: int = MOST_PASSES
    packs = True

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be a number in [0, 1), got {self.tolerance!r}")
        _check_most(self.most)

    def columns(
        self, outputs: Tensor, targets: Any, loss: FullLoss, generator: torch.Generator
    ) -> Columns:
        """Return the columns, largest first, and how many of each example to use."""
        import torch

        _check_passes(self, outputs, targets, loss)
        factor = loss.hessian_factor(outputs.double(), targets)  # (k, *outputs)
        positions = loss.positions(outputs)
        places = [outputs.shape[dimension] for dimension in positions]
        # (k, n, position, c)
        axes = [d + 1 for d in positions]
        axes = [0, 1, *axes, *(d for d in range(2, factor.ndim) if d not in axes)]
        factor = factor.permute(axes)
        rest = factor.shape[2 + len(positions) :]
        factor = factor.reshape(*factor.shape[:2], math.prod(places), math.prod(rest))
        rank = min(factor.shape[0], factor.shape[3])
        hessian = torch.einsum("knpc,knpd->npcd", factor, factor)
        values, vectors = torch.linalg.eigh(hessian)  # ascending
        values = values.flip(2).clamp(min=0)[..., :rank]  # (n, position, k)
        vectors = vectors.flip(3).transpose(2, 3)[:, :, :rank] * values.sqrt()[..., None]
        ordered, _ = values.flatten().sort()
        below = ordered.cumsum(0)
        trace = float(below[-1])
        skip = int(torch.searchsorted(below, self.tolerance * trace, right=True))
        threshold = ordered[skip] if skip < len(ordered) else torch.inf
        used = (values >= threshold) & (values > 0)
        counts = used.flatten(1).sum(1)
        # An example's columns, largest first, each zero but at its own position.
        order = values.flatten(1).sort(stable=True, dim=1, descending=True).indices
        order = order[:, : max(1, int(counts.max()))]
        place, column = order // rank, order % rank
        examples = torch.arange(len(outputs), device=outputs.device)[:, None]
        columns = vectors.new_zeros(*order.shape, math.prod(places), math.prod(rest))
        index = torch.arange(order.shape[1], device=outputs.device)
        columns[examples, index, place] = vectors[examples, place, column]
        back = sorted(range(len(axes)), key=axes.__getitem__)
        columns = columns.view(*order.shape, *places, *rest).permute(back)
        return Columns(
            columns.to(outputs.dtype),
            counts=counts.cpu(),
            trace=trace,
            skipped=trace - float(values[used].sum()),
        )


_MOST_LABELS = 10_000  # each takes a backward pass, and the exact estimator one a class


@dataclass(frozen=True)
class MonteCarlo:
    """Labels drawn from the network's own predictions: unbiased, in ``labels`` backward passes.

    For cross-entropy H = E_y[(p − e_y)(p − e_y)ᵀ] with y drawn from p, so the columns are
    (p − e_y) / √k for k labels drawn independently for each example.  For each weight, an
    example's term has variance Var_y[(∂ log p_y/∂θ)²] / k, at most (Σ_y p_y (∂ log p_y/∂θ)⁴) / k,
    and the mean over N examples 1/N of the mean of these.

    Source: Kunstner, Hennig and Balles, "Limitations of the empirical Fisher approximation", 2019;
    k = 10 is what the authors of the pruning paper used on ImageNet.
    """

    labels: int = 10
    packs = False

    def __post_init__(self) -> None:
        whole = isinstance(self.labels, int) and not isinstance(self.labels, bool)
        if not whole or not 1 <= self.labels <= _MOST_LABELS:
            raise ValueError(
                f"labels must be a whole number from 1 to {_MOST_LABELS:,}, got {self.labels!r}"
            )

    def columns(
        self, outputs: Tensor, targets: Any, loss: FullLoss, generator: torch.Generator
    ) -> Columns:
        """Return gradients of the loss at drawn labels."""
        drawn = loss.draw(outputs, targets, self.labels, generator)
        return Columns(drawn if self.labels == 1 else drawn / self.labels**0.5)


@dataclass(frozen=True)
class EmpiricalFisher:
    """The loss's own gradient as the only column: mean over examples of (∂ℓ/∂θ)².

    Not an estimate of the GGN diagonal: it takes the data's labels where the Fisher matrix takes
    the network's.  Source: Kunstner, Hennig and Balles, 2019, who show how the two differ.
    """

    packs = False

    def columns(
        self, outputs: Tensor, targets: Any, loss: FullLoss, generator: torch.Generator
    ) -> Columns:
        """Return the loss's gradient."""
        return Columns(loss.gradient(outputs, targets)[:, None])


def _check_most(most: int) -> None:
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"most must be a whole number of at least 1, got {most!r}")


def _check_passes(
    estimator: Exact | Tolerance, outputs: Tensor, targets: Any, loss: FullLoss
) -> None:
    """Raise where an example would take too many backward passes; nothing is computed for it."""
    if outputs[0].numel() <= estimator.most:
        return
    passes = loss.rank(outputs, targets)
    if passes > estimator.most:
        raise PruningError(
            f"the exact curvature takes {passes} backward passes for one example, whose outputs "
            f"are {tuple(outputs.shape[1:])}, and no more than {estimator.most} are begun: give "
            f"estimator='monte-carlo' ({MonteCarlo().labels} passes), or "
            f"estimator={replace(estimator, most=passes)} to go on all the same"
        )


def check_worthwhile(estimator: Estimator, outputs: Tensor, targets: Any, loss: FullLoss) -> None:
    """Raise where labels are drawn though all columns take no more backward passes."""
    if not isinstance(estimator, MonteCarlo):
        return
    passes = loss.rank(outputs, targets)
    if 0 < passes <= estimator.labels:
        raise PruningError(
            f"estimator='monte-carlo:{estimator.labels}' takes {estimator.labels} backward passes "
            f"for one example, where the exact curvature takes {passes}: give estimator='exact'"
        )


ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "exact": Exact,
    "tolerance": Tolerance,
    "monte-carlo": MonteCarlo,
    "empirical-fisher": EmpiricalFisher,
}


def find_estimator(estimator: str | Estimator) -> Estimator:
    """Return the estimator of that name, or the estimator given.

    A name may carry a value: ``"monte-carlo:20"`` draws 20 labels, ``"tolerance:0.01"`` skips up
    to a hundredth of the trace, ``"exact:20000"`` takes up to so many backward passes an example.

    Raises:
        ValueError: a name that is not in :data:`ESTIMATORS`, or a value it does not take.

    >>> find_estimator("monte-carlo:20")
    MonteCarlo(labels=20)
    """
    if not isinstance(estimator, str):
        return estimator
    name, colon, value = estimator.partition(":")
    make = find_in(ESTIMATORS, name, "estimator")
    if not colon:
        return make()
    refused = f"estimator {name!r} does not take the value {value!r}"
    try:
        number = int(value) if value.isdigit() else float(value)
    except ValueError:
        raise ValueError(refused) from None
    try:
        return make(number)
    except TypeError:  # this one takes none
        raise ValueError(refused) from None
    except ValueError as error:
        raise ValueError(f"{refused}: {error}") from None
