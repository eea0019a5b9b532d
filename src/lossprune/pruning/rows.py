"""Rows: the weights of one output of a layer, which compete with each other alone.

The outputs of a weight (outputs, inputs, *kernel) are its first dimension; where its inputs are the
first, as of ``transformers``' ``Conv1D`` and transposed convolutions, they are the second.  Of a
stack of experts' matrices each has rows of its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lossprune.pruning.smallest import select_smallest

if TYPE_CHECKING:  # the flags read tables of modules that import this, without torch
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """How a weight is made of rows.

    Attributes:
        inputs: which of its dimensions the inputs are.
        stacked: whether it is a matrix for each expert.
    """

    inputs: int
    stacked: bool = False

    def of(self, tensor: "Tensor") -> "Tensor":
        """Return what belongs to a weight by output: (rows, weights of a row).

        >>> import torch
        >>> Rows(inputs=0).of(torch.tensor([[1, 2, 3], [4, 5, 6]]))
        tensor([[1, 4],
                [2, 5],
                [3, 6]])
        """
        moved = self._moved(tensor)
        return moved.flatten(0, -2) if self.stacked else moved.flatten(1)

    def back(self, rows: "Tensor", like: "Tensor") -> "Tensor":
        """Return rows in the shape of a weight, the reverse of :meth:`of`."""
        moved = rows.view(self._moved(like).shape)
        if self.stacked:
            return moved.movedim(-1, self.inputs).contiguous()
        return moved.movedim(0, self._outputs).contiguous()

    @property
    def _outputs(self) -> int:
        return 1 if self.inputs == 0 else 0

    def _moved(self, tensor: "Tensor") -> "Tensor":
        if self.stacked:
            return tensor.movedim(self.inputs, -1)
        return tensor.movedim(self._outputs, 0)


def select_by_row(
    saliency: "Tensor", kept: "Tensor", free: "Tensor", count: int, rows: Rows
) -> "Tensor":
    """Mark the smallest of each row, so many in all that every row has lost as many, or one more.

    Rows that had lost more before lose none until the others have as many; rows that have no more
    to lose leave it to the others.

    Args:
        saliency: of one weight, as in :func:`select_smallest`.
        kept: bool: what is left of it.
        free: bool: what of that may go.
        count: how many to mark.
        rows: how it is made of rows.

    Returns:
        Bool, of its shape.  Of the rows that may lose one more the smallest saliencies decide.

    >>> import torch
    >>> s = torch.tensor([[1.0, 2.0, 3.0], [7.0, 9.0, 8.0]])
    >>> every = torch.ones_like(s, dtype=torch.bool)
    >>> select_by_row(s, every, every, 3, Rows(inputs=1))
    tensor([[ True,  True, False],
            [ True, False, False]])
    """
    import torch

    if count == 0:
        return torch.zeros_like(kept)
    scores, open_ = rows.of(saliency), rows.of(free)
    order = scores.masked_fill(~open_, torch.inf).argsort(dim=1, stable=True)
    # When a weight goes, if every row loses one at each turn.
    numbers = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    turn = torch.empty_like(order, dtype=torch.int32).scatter_(1, order, numbers.expand_as(order))
    turn += (~rows.of(kept)).sum(1, keepdim=True, dtype=torch.int32)
    gone = turn[open_].bincount().cumsum(0)
    last = int(torch.searchsorted(gone, count))
    missing = count - (int(gone[last - 1]) if last else 0)
    marked, tied = open_ & (turn < last), open_ & (turn == last)
    every = torch.ones(int(gone[last]) - count + missing, dtype=torch.bool, device=order.device)
    marked[tied] = select_smallest({"": scores[tied]}, {"": every}, missing)[""]
    return rows.back(marked, saliency)
