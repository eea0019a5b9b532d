"""Preconditioned conjugate gradients for several dampings at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """What was found for one damping λ.

    Attributes:
        damping: λ.
        x: nearly where ½ xᵀ(A + λ I)x − bᵀx is least: (n,).
        change: ½ xᵀAx − bᵀx there, without λ.
    """

    damping: float
    x: Tensor
    change: float


@dataclass(frozen=True)
class Solutions:
    """What was found for every damping.

    Attributes:
        of_each: in the order of the dampings.
        iterations: products with A.
        residual: |b − (A + λ I) x| / |b| for the first λ.
    """

    of_each: tuple[Solution, ...]
    iterations: int
    residual: float


def solve(
    product: Product,
    b: Tensor,
    preconditioner: Callable[[float], Tensor],
    dampings: Sequence[float],
    *,
    iterations: int,
    tolerance: float,
) -> Solutions:
    """Solve (A + λ I) x = b for every λ, with the products that one of them takes.

    Conjugate gradients for the first λ build a space, in which the x of every λ is the best there
    is; for the first λ that is what conjugate gradients give.  Where they end before the iterations
    are used up, those of each other λ go on from its x, so that with enough iterations all x are
    exact to the tolerance.

    Args:
        product: x ↦ A x, A symmetric and positive semi-definite.
        b: (n,).
        preconditioner: the diagonal M > 0 for a λ, (n,).
        dampings: λ > 0.
        iterations: of conjugate gradients, at most, for each λ.
        tolerance: of |b − (A + λ I) x| / |b|, below which they end.

    Source: Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    first = dampings[0]
    space = _krylov_space(product, b, preconditioner(first), first, iterations, tolerance)
    used, found = len(space.directions), []
    for damping in dampings:
        x, change = space.minimiser(damping) if damping != first else (space.x, space.change)
        if damping != first and space.residual <= tolerance and used < iterations:
            x, change, more = _polished(
                product, b, preconditioner(damping), damping, x, iterations - used, tolerance
            )
            used += more
        found.append(Solution(damping, x, change))
    return Solutions(tuple(found), used, space.residual)


def _polished(
    product: Product,
    b: Tensor,
    preconditioner: Tensor,
    damping: float,
    x: Tensor,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, float, int]:
    """The x after more conjugate gradients, ½ xᵀAx − bᵀx, and how many products they took."""
    residual = b - product(x) - damping * x
    size = _norm(residual)
    tolerance = tolerance * _norm(b) / size if size else 1.0
    space = _krylov_space(product, residual, preconditioner, damping, iterations, tolerance)
    x = x + space.x
    return x, 0.5 * _dot(x, product(x)) - _dot(b, x), len(space.directions) + 2


@dataclass(frozen=True)
class _KrylovSpace:
    """Directions P that conjugate gradients went along, of norm 1, and what A and b are in them.

    Attributes:
        directions: the k rows of P, (n,) each.
        curvature: P A Pᵀ, (k, k), float64.
        overlap: P Pᵀ, (k, k), float64.
        slope: P b, (k,), float64.
        x: what conjugate gradients found for the λ that the space was built with.
        change: ½ xᵀAx − bᵀx there.
        residual: |b − (A + λ I) x| / |b| at the end.
    """

    directions: list[Tensor]
    curvature: Tensor
    overlap: Tensor
    slope: Tensor
    x: Tensor
    change: float
    residual: float

    def minimiser(self, damping: float) -> tuple[Tensor, float]:
        """The best x in the space for a damping, and ½ xᵀAx − bᵀx there."""
        matrix = self.curvature + damping * self.overlap
        # Directions that rounding has made dependent add nothing.
        y = torch.linalg.lstsq(matrix, self.slope[:, None], driver="gelsd").solution[:, 0]
        change = float(0.5 * y @ self.curvature @ y - self.slope @ y)
        x = torch.zeros_like(self.x)
        for coordinate, direction in zip(y.tolist(), self.directions, strict=True):
            x.add_(direction, alpha=coordinate)
        return x, change


def _krylov_space(
    product: Product,
    b: Tensor,
    preconditioner: Tensor,
    damping: float,
    iterations: int,
    tolerance: float,
) -> _KrylovSpace:
    size = _norm(b)
    x, r = torch.zeros_like(b), b.clone()
    z = r / preconditioner
    p, rz = z, _dot(r, z)
    directions: list[Tensor] = []
    # Rows of symmetric matrices, up to the diagonal.
    curvature: list[list[float]] = []
    overlap: list[list[float]] = []
    while len(directions) < iterations and rz > 0 and _norm(r) > tolerance * size:
        length = _norm(p)
        direction = p / length
        curved = product(direction)
        directions.append(direction)
        curvature.append([_dot(before, curved) for before in directions])
        overlap.append([_dot(before, direction) for before in directions])
        step = rz / length / (curvature[-1][-1] + damping)
        x.add_(direction, alpha=step)
        r.add_(curved, alpha=-step).add_(direction, alpha=-step * damping)
        z = r / preconditioner
        rz, previous = _dot(r, z), rz
        p = z.add_(direction, alpha=rz / previous * length)
    return _KrylovSpace(
        directions,
        _symmetric(curvature),
        _symmetric(overlap),
        torch.tensor([_dot(b, direction) for direction in directions], dtype=torch.float64),
        x,
        # as A x = b − r − λ x
        -0.5 * (_dot(b, x) + _dot(r, x) + damping * _dot(x, x)),
        _norm(r) / size if size else 0.0,
    )


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))


def _norm(vector: Tensor) -> float:
    return _dot(vector, vector) ** 0.5


def _symmetric(rows: list[list[float]]) -> Tensor:
    matrix = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for k, row in enumerate(rows):
        matrix[k, : k + 1] = matrix[: k + 1, k] = torch.tensor(row, dtype=torch.float64)
    return matrix
