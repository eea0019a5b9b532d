"""Loss functions, as the curvature estimate sees them.

With the outputs z (the logits) of one example, a loss ℓ(z, t) gives its value, its gradient ∂ℓ/∂z
and a factor S of its Hessian in the outputs, S Sᵀ = ∂²ℓ/∂z².  L is the mean of ℓ over the examples.
"""

from typing import Protocol

import torch
from torch import Tensor

from lossprune.pruning.errors import PruningError


class Loss(Protocol):
    """What a loss must offer; n examples, c outputs, k columns of the factor."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise a :class:`PruningError` that says how outputs and targets do not fit."""
        ...

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ℓ of each example: (n,)."""
        ...

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ∂ℓ/∂z of each example: (n, c)."""
        ...

    def hessian_factor(self, outputs: Tensor) -> Tensor:
        """Return S of each example: (k, n, c), with Σ_k S[k, n, c] S[k, n, d] = ∂²ℓ_n/∂z_c∂z_d."""
        ...

    def sample(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        """Return targets drawn from what the outputs predict, by numbers uniform in [0, 1): (n, m).

        The gradient at a drawn target must have mean 0 and covariance ∂²ℓ/∂z².
        """
        ...


class CrossEntropy:
    r"""Softmax cross-entropy with class indices: ℓ(z, t) = −log softmax(z)_t.

    With p = softmax(z): ∂ℓ/∂z = p − e_t and ∂²ℓ/∂z² = diag(p) − p pᵀ, which has rank C − 1.  Its
    Cholesky factor is known in closed form: with the tail sums r_k = Σ_{j ≥ k} p_j,

        S_kk = √(p_k r_{k+1} / r_k),    S_jk = −(p_j / r_{k+1}) S_kk  for j > k,    k < C.

    Every entry is a product of positive numbers, so unlike √p_k (e_k − p), which has one column
    more, it loses no digits where the network is confident (1 − p_k small).

    >>> z = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    >>> s = CrossEntropy().hessian_factor(z)[:, 0]
    >>> p = z.softmax(1)[0]
    >>> s.shape, torch.allclose(s.T @ s, p.diag() - p.outer(p))
    (torch.Size([2, 3]), True)
    """

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise unless outputs are (n, c) logits and targets n whole numbers in [0, c)."""
        if outputs.ndim != 2:
            raise PruningError(
                f"cross-entropy needs outputs of shape (examples, classes), got "
                f"{tuple(outputs.shape)}"
            )
        if targets.shape != outputs.shape[:1] or targets.is_floating_point():
            raise PruningError(
                f"cross-entropy needs one whole-number class per example, shape "
                f"({outputs.shape[0]},), got targets of shape {tuple(targets.shape)} "
                f"and type {targets.dtype}"
            )
        lowest, highest = int(targets.min()), int(targets.max())
        if lowest < 0 or highest >= outputs.shape[1]:
            raise PruningError(
                f"targets must lie in [0, {outputs.shape[1]}), the network's classes, "
                f"got {lowest if lowest < 0 else highest}"
            )

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return −log softmax(z)_t: (n,)."""
        return torch.nn.functional.cross_entropy(outputs, targets.long(), reduction="none")

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return softmax(z) − e_t: (n, c)."""
        gradient = outputs.softmax(1)
        return gradient.scatter_add_(
            1, targets.long()[:, None], torch.full_like(gradient[:, :1], -1.0)
        )

    def hessian_factor(self, outputs: Tensor) -> Tensor:
        """Return the Cholesky factor of diag(p) − p pᵀ: (c − 1, n, c)."""
        p = outputs.double().softmax(1)
        tail = p.flip(1).cumsum(1).flip(1)  # r_k
        after = tail[:, 1:]  # r_{k+1}
        # Where a class and all after it have vanished (0 / 0), so has their part of the Hessian.
        diagonal = (p[:, :-1] * (after / tail[:, :-1]).nan_to_num(nan=0.0)).sqrt()
        ratio = (p[:, None, :] / after[:, :, None]).nan_to_num(nan=0.0, posinf=0.0)
        factor = -diagonal[:, :, None] * ratio.triu(1)
        factor.diagonal(dim1=1, dim2=2).copy_(diagonal)
        return factor.transpose(0, 1).to(outputs.dtype)

    def sample(self, outputs: Tensor, uniform: Tensor) -> Tensor:
        """Return classes drawn with probabilities softmax(z): (n, m)."""
        distribution = outputs.double().softmax(1).cumsum(1)
        drawn = torch.searchsorted(distribution, uniform * distribution[:, -1:], right=True)
        return drawn.clamp(max=outputs.shape[1] - 1)


LOSSES: dict[str, Loss] = {"cross_entropy": CrossEntropy()}


def find_loss(loss: str | Loss) -> Loss:
    """Return the loss of that name, or the loss given.

    Raises:
        ValueError: a name that is not in :data:`LOSSES`.
    """
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; choose one of: {', '.join(LOSSES)}")
    return LOSSES[loss]
