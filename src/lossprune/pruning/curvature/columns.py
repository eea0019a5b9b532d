"""The vectors in a network's outputs that are sent backwards through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that the estimators' names can be listed without torch
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    Key = int | tuple[int, ...]


@dataclass(frozen=True)
class Columns:
    """The columns of some examples: n example, k column; outputs of any shape.

    Where the output Hessian has no entries between different positions of the outputs (tokens,
    pixels), a column is zero everywhere but at one position.  Only that part is stored: each of
    the k vectors holds one column for every position.

    Attributes:
        vectors: (n, k, *outputs).
        positions: dimensions of the outputs that are positions, counted with the examples as 0;
            empty where a vector is a column.
        counts: how many of the k columns of each example are in use, the first ones; (n,), on the
            CPU.  None: all.
        trace: Σ over examples of the trace of H.
        skipped: how much of it the unused columns had.

    >>> import torch
    >>> columns = Columns(torch.tensor([[[1.0, 2.0, 0.0]]]), positions=(1,))
    >>> [columns[key].tolist() for key in columns.keys()]
    [[[1.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]]]
    """

    vectors: Tensor
    positions: tuple[int, ...] = ()
    counts: Tensor | None = None
    trace: float = 0.0
    skipped: float = 0.0

    def keys(self) -> Sequence[Key]:
        """Return what names the columns; those that are zero for all examples are left out."""
        if not self.positions:
            return range(self.vectors.shape[1])
        kept = (1, *(dimension + 1 for dimension in self.positions))
        rest = [axis for axis in range(self.vectors.ndim) if axis not in kept]
        return [tuple(key) for key in (self.vectors != 0).any(dim=rest).nonzero().tolist()]

    def __getitem__(self, key: Key) -> Tensor:
        """Return one column of every example: (n, *outputs)."""
        if isinstance(key, int):
            return self.vectors[:, key]
        vector = self.vectors[:, key[0]]
        index: list[slice | int] = [slice(None)] * vector.ndim
        for dimension, position in zip(self.positions, key[1:], strict=True):
            index[dimension] = position
        column = vector.new_zeros(vector.shape)
        column[tuple(index)] = vector[tuple(index)]
        return column

    def packed(self, examples: Callable[[int], int]) -> Iterator[tuple[Tensor, int]]:
        """Yield indices of examples, and how many columns they use: those with as many together.

        ``examples(k)`` says how many examples of k columns may go together.
        """
        assert self.counts is not None
        for count in self.counts.unique().tolist():
            alike = (self.counts == count).nonzero().flatten()
            for chosen in alike.split(examples(count)):
                yield chosen, count
