"""Layer by layer: a weight whose products with what its layer is given change least.

With the inputs X of a layer, (inputs, positions), and its weight W, (outputs, inputs), the error of
a pruned and moved Ŵ is ‖(W − Ŵ) X‖², the sum over rows d of W − Ŵ of d H dᵀ, H = X Xᵀ.  Removing a
weight q of a row and moving the others to their optimum costs w_q² / [H⁻¹]_qq and moves them by
−(w_q / [H⁻¹]_qq) [H⁻¹]_q (Hassibi and Stork, "Second order derivatives for network pruning", 1992).

SparseGPT goes through the columns from left to right, for all rows at once, and moves only columns
to the right of what it removes, so that one Cholesky factor Uᵀ U = H⁻¹ has the inverses of all that
remains of H: the row q of U is [H_{q:}⁻¹]_q / √[H_{q:}⁻¹]_qq.  Which weights go is decided block by
block, by w² / [H_{q:}⁻¹]_qq as the weights are then.

Source: Frantar and Alistarh, "SparseGPT: Massive language models can be accurately pruned in
one-shot", ICML 2023.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lossprune.pruning.errors import PruningError
from lossprune.pruning.patterns import Pattern
from lossprune.pruning.smallest import select_smallest

# The columns of which it is decided together, as published.
BLOCK = 128
DAMPING = 0.01

# Which weights of some columns go, of their scores and where they begin: bool, (rows, columns).
_Choose = Callable[[Tensor, int], Tensor]


def reconstruct(
    weight: Tensor,
    moments: Tensor,
    *,
    kept: Tensor | None = None,
    count: int | None = None,
    pattern: Pattern | None = None,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Prune a weight and move what is left of it, so that its layer's outputs change least.

    Args:
        weight: W, (outputs, inputs), real.
        moments: X Xᵀ, (inputs, inputs), over all examples and positions, in float32 or wider: the
            sweep is computed in its type.
        kept: a mask to keep to, bool; or one of the next two.
        count: how many weights to remove, exactly.  Each block of columns loses its share of them.
        pattern: N:M along the inputs.
        damping: what is added to the diagonal of ``moments``, as a share of its mean.
        block: columns of which it is decided together.

    Returns:
        Ŵ, 0 where removed, of the type of ``moments``; and the mask, True where kept.  Weights of
        inputs that are always 0 go first.

    Raises:
        PruningError: ``moments`` has no inverse in its type.

    >>> weight, x = torch.randn(4, 8).double(), torch.randn(8, 100).double()
    >>> moved, kept = reconstruct(weight, x @ x.T, count=16)
    >>> masked = (weight * ~kept) @ x  # what the mask alone changes
    >>> bool(((weight - moved) @ x).norm() < masked.norm()), int((moved == 0).sum())
    (True, 16)
    """
    if pattern is not None:
        block = max(pattern.of, block // pattern.of * pattern.of)
    dead = moments.diagonal() == 0
    factor = _inverse_factor(moments, dead, damping)
    left = weight.detach().to(moments.dtype, copy=True)
    choose = _choice(left.shape, kept, count, pattern, block)
    mask = torch.ones_like(left, dtype=torch.bool)
    for start in range(0, left.shape[1], block):
        columns = slice(start, min(start + block, left.shape[1]))
        if pattern is None:
            mask[:, columns] = ~choose(_scores(left, factor, dead, columns), start)
        errors = torch.zeros_like(left[:, columns])
        for q in range(columns.start, columns.stop):
            if pattern is not None and q % pattern.of == 0:
                group = slice(q, q + pattern.of)
                mask[:, group] = ~choose(_scores(left, factor, dead, group), q)
            gone = left[:, q].masked_fill(mask[:, q], 0.0) / factor[q, q]
            inside = slice(q, columns.stop)
            left[:, inside] -= gone[:, None] * factor[q, inside]
            errors[:, q - start] = gone
        left[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return left.masked_fill(~mask, 0.0), mask


def _inverse_factor(moments: Tensor, dead: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with Uᵀ U = (H + damping · mean diag H · I)⁻¹."""
    damped = moments.clone()
    diagonal = damped.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal.masked_fill_(dead, 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not int(failed):
        lower, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower))
    if int(failed) or not lower.isfinite().all():
        raise PruningError(
            "the products of the inputs with each other have no inverse: there are too few "
            "examples, or they are not finite; give more, or a larger damping"
        )
    return lower.T.contiguous()


def _scores(left: Tensor, factor: Tensor, dead: Tensor, columns: slice) -> Tensor:
    """w² / [H_{q:}⁻¹]_qq; −1 of what is 0 already, or is multiplied by nothing else."""
    scores = (left[:, columns] / factor.diagonal()[columns]).square()
    return scores.masked_fill((left[:, columns] == 0) | dead[columns], -1.0)


def _choice(
    shape: torch.Size,
    kept: Tensor | None,
    count: int | None,
    pattern: Pattern | None,
    block: int,
) -> _Choose:
    """What decides which weights go."""
    if kept is not None:
        return lambda scores, start: ~kept[:, start : start + scores.shape[1]]
    every = torch.ones(1, 1, dtype=torch.bool)
    if pattern is not None:
        return lambda scores, start: pattern.candidates(
            scores, every.to(scores.device).expand_as(scores), 1
        )
    inputs = shape[1]
    assert count is not None

    def choose(scores: Tensor, start: int) -> Tensor:
        # What all blocks up to here lose, to the weight: rounding never adds up.
        stop = start + scores.shape[1]
        here = round(count * stop / inputs) - round(count * start / inputs)
        everything = every.to(scores.device).expand_as(scores)
        return select_smallest({"": scores}, {"": everything.contiguous()}, here)[""]

    return choose
