"""Squares of weights whose rows are looked up: an embedding, also where it is the head as well.

An example's gradient in such a weight is Σ_p y_p x_pᵀ of its products, as of any linear layer's,
and more in the rows that it looks up: the gradients at what was looked up, summed row by row.
These rows, few of many, are squared apart from the others.

Index letters as in ``squares.py``; r looked up row, of those that an example has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lossprune.pruning.curvature.squares import Block, product


@dataclass(frozen=True)
class Rows:
    """What one example looks up.

    Attributes:
        rows: their numbers, each once: (r,).
        gradients: sums of the gradients at what was looked up: (k, r, i).
    """

    rows: Tensor
    gradients: Tensor

    @classmethod
    def of(cls, ids: Tensor, gradients: Tensor) -> "Rows":
        """Return the rows of all positions: ids (p,), gradients (k, p, i)."""
        rows, place = ids.unique(return_inverse=True)
        sums = gradients.new_zeros(len(gradients), len(rows), gradients.shape[2])
        return cls(rows, sums.index_add_(1, place, gradients))


def add_rows_(
    total: Tensor, rows: Sequence[Rows], patches: Block | None, gradients: Block | None
) -> None:
    """Add to ``total``, (rows, i), the squares of the rows that each example looks up.

    Args:
        total: added to in place.
        rows: of each example.
        patches: of the products with the weight, as in ``add_squares_``; None: there are none.
        gradients: of these.
    """
    for example, own in enumerate(rows):
        sums = own.gradients
        if patches is not None and gradients is not None:
            one = slice(example, example + 1)
            x, y = patches(one)[0, 0], gradients(one)[0, :, 0]  # (i, p), (k, o, p)
            y = y.index_select(1, own.rows)
            sums = sums + product(y.flatten(0, 1), x).view(sums.shape)
        total.index_add_(0, own.rows, sums.square().sum(0))


def without_rows(gradients: Block, rows: Sequence[Rows]) -> Block:
    """Return the gradients, (n, k, g, o, p), 0 in the rows that each example looks up."""

    def block(examples: slice) -> Tensor:
        y = gradients(examples).clone()
        for own, each in zip(rows[examples], y, strict=True):
            each.index_fill_(2, own.rows, 0.0)
        return y

    return block
