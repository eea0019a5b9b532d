"""A batch of examples, whatever it is made of."""

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lossprune.pruning.curvature.forms import understood
from lossprune.pruning.errors import PruningError

Forward = Callable[[nn.Module, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Batch:
    """Tensors in tuples, lists or dicts, all with one entry per example as first dimension.

    What is made of anything else is kept whole: it can be neither cut nor joined.

    Attributes:
        leaves: its tensors, and what else is in it.
        structure: how they hang together.
        size: how many examples; None where the batch must be kept whole.
    """

    leaves: tuple[Any, ...]
    structure: TreeSpec
    size: int | None

    @classmethod
    def of(cls, batch: Any, forward: Forward | None = None) -> "Batch":
        """Return the batch as one; without a ``forward`` it must be one of the known forms.

        Raises:
            PruningError: it is of no form that :func:`understood` knows, and there is no
                ``forward``.

        >>> batch = Batch.of((torch.zeros(3, 2), torch.zeros(3)))
        >>> batch.size, [part.shape[0] for part in batch[:2].value]
        (3, [2, 2])
        """
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, (Mapping, UserDict)) and not isinstance(batch, dict):
            batch = dict(batch)
        if forward is None:
            batch = understood(batch)
        leaves, structure = tree_flatten(batch)
        batch = cls(tuple(leaves), structure, _size(leaves))
        if forward is None and batch.size is None:
            raise PruningError(
                "the tensors of a batch must all have one entry per example, got "
                + ", ".join(map(_describe, leaves[:8]))
                + "; anything else needs forward=lambda model, batch: (outputs, targets)"
            )
        return batch

    @property
    def value(self) -> Any:
        """The batch as it was given."""
        return tree_unflatten(list(self.leaves), self.structure)

    @property
    def kind(self) -> Any:
        """What batches must have in common to be joined."""
        leaves = [tuple(x.shape[1:]) if isinstance(x, Tensor) else x for x in self.leaves]
        return self.structure, leaves, None if self.size is not None else object()

    def __len__(self) -> int:
        assert self.size is not None
        return self.size

    def __getitem__(self, examples: slice | Tensor) -> "Batch":
        """Return these examples of it."""
        batch = self.map(lambda tensor: tensor[examples])
        return Batch(batch.leaves, self.structure, _size(batch.leaves))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return it with the function applied to every tensor."""
        leaves = (function(x) if isinstance(x, Tensor) else x for x in self.leaves)
        return Batch(tuple(leaves), self.structure, self.size)

    def to(self, device: torch.device) -> "Batch":
        """Return it on that device; what is no tensor is moved if it has a ``to``."""
        leaves = (x.to(device) if hasattr(x, "to") else x for x in self.leaves)
        return Batch(tuple(leaves), self.structure, self.size)


def join(batches: Sequence[Batch]) -> Batch:
    """Return all examples of batches of one kind as one batch."""
    first = batches[0]
    if len(batches) == 1:
        return first
    leaves = tuple(
        torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*(batch.leaves for batch in batches), strict=True)
    )
    return Batch(leaves, first.structure, sum(map(len, batches)))


def _size(leaves: Sequence[Any]) -> int | None:
    """How many examples; None unless all leaves that could depend on them are such tensors."""
    tensors = [leaf for leaf in leaves if not (leaf is None or isinstance(leaf, bool))]
    if not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in tensors):
        return None
    sizes = {len(leaf) for leaf in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def _describe(leaf: Any) -> str:
    return str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
