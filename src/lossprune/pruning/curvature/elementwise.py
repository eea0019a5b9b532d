"""Losses that are a mean over outputs which do not mix: squared error, and binary cross-entropy.

Index letters: n example, d output of one example, D how many there are.  The Hessian in the
outputs is diagonal, so its factor is too: one vector, whose every entry is a column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossprune.pruning.curvature.forms import check_shapes_alike
from lossprune.pruning.errors import PruningError


class _Elementwise:
    """A loss whose Hessian in the outputs is diagonal."""

    def hessian_factor(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def positions(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the dimensions of the outputs that are positions: all but the examples'."""
        return tuple(range(1, outputs.ndim))

    def rank(self, outputs: Tensor, targets: Tensor) -> int:
        """Return D."""
        return _size(outputs)

    def hessian_product(self, outputs: Tensor, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return the diagonal of ∂²ℓ/∂z² times the vectors, which are like the outputs."""
        return self.hessian_factor(outputs, targets)[0].square() * vectors

    def draw(
        self, outputs: Tensor, targets: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """Return the factor with random signs: (n, count, *outputs)."""
        vector = self.hessian_factor(outputs, targets)[0]
        shape = (len(vector), count, *vector.shape[1:])
        # Drawn on the CPU, so that every device gets the same signs.
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return vector[:, None] * signs.to(vector)


@dataclass(frozen=True)
class MeanSquaredError(_Elementwise):
    """Squared error: ℓ(z, t) = 1/D Σ_d (z_d − t_d)².

    L is what ``torch.nn.functional.mse_loss`` gives with ``reduction="mean"``: the mean over all
    outputs of all examples.  ∂ℓ/∂z = 2 (z − t) / D and ∂²ℓ/∂z² = 2/D I, with D columns.

    >>> z, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    >>> MeanSquaredError().value(z, t), MeanSquaredError().gradient(z, t)
    (tensor([2.5000]), tensor([[ 1., -2.]]))
    """

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise unless targets have the outputs' shape."""
        check_shapes_alike("the squared error", outputs, targets)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ℓ of each example: (n,)."""
        return _rows(outputs - targets).square().mean(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ∂ℓ/∂z: like the outputs."""
        return 2 / _size(outputs) * (outputs - targets)

    def hessian_factor(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return √(2/D) for every output: (1, *outputs)."""
        return torch.full_like(outputs, (2 / _size(outputs)) ** 0.5)[None]


@dataclass(frozen=True)
class BinaryCrossEntropy(_Elementwise):
    """Binary cross-entropy with logits: ℓ(z, t) = −1/D Σ_d w_d (a_d t_d log σ_d + (1 − t_d) log(1 − σ_d)).

    σ = 1 / (1 + e^(−z)), targets t in [0, 1].  L is what
    ``torch.nn.functional.binary_cross_entropy_with_logits`` gives with ``reduction="mean"``: the
    mean over all outputs of all examples.  With b = 1 + (a − 1) t,

        ∂ℓ/∂z = w/D (1 − t − b (1 − σ)),    ∂²ℓ/∂z² = diag(w/D b σ (1 − σ)),

    with D columns.

    Attributes:
        weight: w ≥ 0, of the outputs of one example, or what broadcasts to them; None: 1.
        pos_weight: a ≥ 0, likewise, of the positive part.

    >>> BinaryCrossEntropy().value(torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 1.0]]))
    tensor([0.6931])
    """  # noqa: E501 - a formula

    weight: Sequence[Any] | Tensor | None = None
    pos_weight: Sequence[Any] | Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "pos_weight"):
            given = getattr(self, name)
            if given is None:
                continue
            tensor = torch.as_tensor(given, dtype=torch.float64)
            if not bool((tensor.isfinite() & (tensor >= 0)).all()):
                raise ValueError(f"{name} must be finite numbers of at least 0, got {given!r}")
            object.__setattr__(self, name, _as_tuple(tensor.tolist()))

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise unless targets have the outputs' shape and lie in [0, 1]."""
        check_shapes_alike("binary cross-entropy", outputs, targets)
        lowest, highest = float(targets.min()), float(targets.max())
        if not (lowest >= 0 and highest <= 1):
            raise PruningError(
                "targets of binary cross-entropy must lie in [0, 1], "
                f"got {highest if lowest >= 0 else lowest}"
            )
        for name in ("weight", "pos_weight"):
            tensor = self._given(name, outputs)
            if tensor is None:
                continue
            try:
                fits = torch.broadcast_shapes(tensor.shape, outputs.shape[1:]) == outputs.shape[1:]
            except RuntimeError:
                fits = False
            if not fits:
                raise PruningError(
                    f"{name} must broadcast to the outputs of one example, "
                    f"{tuple(outputs.shape[1:])}, got shape {tuple(tensor.shape)}"
                )

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ℓ of each example: (n,)."""
        values = F.binary_cross_entropy_with_logits(
            outputs,
            targets.to(outputs.dtype),
            weight=self._given("weight", outputs),
            pos_weight=self._given("pos_weight", outputs),
            reduction="none",
        )
        return _rows(values).mean(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ∂ℓ/∂z: like the outputs."""
        targets = targets.to(outputs.dtype)
        gradient = 1 - targets - self._slope(outputs, targets) * (-outputs).sigmoid()
        return self._weighted(gradient)

    def hessian_factor(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return √(w/D b σ (1 − σ)) of every output: (1, *outputs)."""
        slope = 1.0 if targets is None else self._slope(outputs, targets.to(outputs.dtype))
        return self._weighted(slope * outputs.sigmoid() * (-outputs).sigmoid()).sqrt()[None]

    def _slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        positive = self._given("pos_weight", outputs)
        return torch.ones_like(targets) if positive is None else 1 + (positive - 1) * targets

    def _weighted(self, per_output: Tensor) -> Tensor:
        weight = self._given("weight", per_output)
        return (per_output if weight is None else weight * per_output) / _size(per_output)

    def _given(self, name: str, like: Tensor) -> Tensor | None:
        given = getattr(self, name)
        return None if given is None else torch.tensor(given, dtype=like.dtype, device=like.device)


def _as_tuple(numbers: Any) -> Any:
    return tuple(map(_as_tuple, numbers)) if isinstance(numbers, list) else numbers


def _size(outputs: Tensor) -> int:
    return outputs[0].numel()


def _rows(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
