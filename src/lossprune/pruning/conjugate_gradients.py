"""Preconditioned conjugate gradients whose one Krylov space serves every damping."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KrylovSpace:
    """Directions P that conjugate gradients went along, and what A and b are in them.

    Attributes:
        directions: P, (k, n), of norm 1 each.
        curvature: Pᵀ A P, (k, k), float64, without damping.
        overlap: Pᵀ P, (k, k), float64.
        slope: Pᵀ b, (k,), float64.
        residual: |b − (A + λ I) x| / |b| at the end, of the damping λ that it was built with.
    """

    directions: Tensor
    curvature: Tensor
    overlap: Tensor
    slope: Tensor
    residual: float

    def minimiser(self, damping: float) -> Tensor:
        """Return the x in the space with the least ½ xᵀ(A + λ I)x − bᵀx.

        Of the damping that the space was built with that is what conjugate gradients give.
        """
        return self._coordinates(damping).to(self.directions) @ self.directions

    def change(self, damping: float) -> float:
        """Return ½ xᵀAx − bᵀx at the minimiser for that damping: λ is not in it."""
        y = self._coordinates(damping)
        return float(0.5 * y @ self.curvature @ y - self.slope @ y)

    def _coordinates(self, damping: float) -> Tensor:
        matrix = self.curvature + damping * self.overlap
        # Directions that rounding has made dependent add nothing.
        return torch.linalg.lstsq(matrix, self.slope[:, None], driver="gelsd").solution[:, 0]


def krylov_space(
    product: Callable[[Tensor], Tensor],
    b: Tensor,
    preconditioner: Tensor,
    damping: float,
    iterations: int,
    tolerance: float,
) -> KrylovSpace:
    """Solve (A + λ I) x = b by preconditioned conjugate gradients, and keep where they went.

    Args:
        product: x ↦ A x, A symmetric and positive semi-definite; called once an iteration.
        b: (n,).
        preconditioner: the diagonal M > 0, (n,).
        damping: λ.
        iterations: at most so many.
        tolerance: of |b − (A + λ I) x| / |b|, below which they end.

    Source: Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    size = _norm(b)
    r = b.clone()
    z = r / preconditioner
    p = z.clone()
    rz = _dot(r, z)
    directions: list[Tensor] = []
    rows: list[list[float]] = []
    slope: list[float] = []
    overlap: list[list[float]] = []
    while len(directions) < iterations and size and _norm(r) > tolerance * size and rz > 0:
        length = _norm(p)
        direction = p / length
        curved = product(direction)
        directions.append(direction)
        rows.append([_dot(before, curved) for before in directions])
        overlap.append([_dot(before, direction) for before in directions])
        slope.append(_dot(b, direction))
        along = rows[-1][-1] + damping
        step = rz / length / along
        r = r - step * (curved + damping * direction)
        z = r / preconditioner
        rz, previous = _dot(r, z), rz
        p = z + rz / previous * p
    return KrylovSpace(
        torch.stack(directions) if directions else b.new_zeros(0, len(b)),
        _symmetric(rows),
        _symmetric(overlap),
        torch.tensor(slope, dtype=torch.float64),
        _norm(r) / size if size else 0.0,
    )


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())


def _norm(vector: Tensor) -> float:
    return _dot(vector, vector) ** 0.5


def _symmetric(rows: Iterable[list[float]]) -> Tensor:
    """The matrix of which these are the rows up to the diagonal."""
    rows = list(rows)
    matrix = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for k, row in enumerate(rows):
        matrix[k, : k + 1] = matrix[: k + 1, k] = torch.tensor(row, dtype=torch.float64)
    return matrix
