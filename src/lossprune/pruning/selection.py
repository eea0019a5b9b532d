"""Which weights a stage removes: the smallest saliencies, of what scope and pattern let go.

The k-th smallest of N saliencies is found by counting, not by sorting: the bits of a float, read as
an integer, order as the float does, so a histogram of their leading 16 bits tells in which of
65,536 bins the k-th smallest lies, and further ones refine it (2 passes for float32, 4 for
float64).  Each pass is linear in N, takes one layer at a time in chunks, never joins the layers,
and counts integers, so the answer is the same on every device.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.pruning.errors import PruningError
from lossprune.pruning.patterns import Pattern
from lossprune.pruning.scopes import Scope, quotas

_DIGIT_BITS = 16
_DIGITS = 1 << _DIGIT_BITS
_CHUNK = 1 << 24
_INTEGER = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}


@dataclass(frozen=True)
class Selection:
    """How many weights are removed at a sparsity, and which.

    Attributes:
        scope: whether weights compete globally, or in which layers how many go.
        pattern: N:M, or None.
        shapes: of the weights that are pruned, by parameter name.
        inputs: which of a weight's dimensions its inputs are, by name; for patterns.
        dense: name of the layer that the scope keeps dense, if any.
        stacked: names of the weights that are a matrix for each expert: layers of their own, alike,
            where a scope goes by the shape of a layer.
    """

    scope: Scope
    pattern: Pattern | None
    shapes: Mapping[str, torch.Size]
    inputs: Mapping[str, int]
    dense: str | None = None
    stacked: frozenset[str] = frozenset()

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: shape.numel() for name, shape in self.shapes.items()}

    @property
    def total(self) -> int:
        """How many weights there are."""
        return sum(self._sizes.values())

    def _most(self) -> dict[str, int]:
        """How many weights each layer may lose."""
        most = self._sizes
        if self.pattern is not None:
            groups = {name: size // self.pattern.of for name, size in most.items()}
            most = {n: (self.pattern.of - self.pattern.keep) * g for n, g in groups.items()}
        return {name: 0 if name == self.dense else count for name, count in most.items()}

    def count(self, sparsity: float) -> int:
        """Return how many weights are gone at this sparsity: round(κ · N).

        With a pattern, N is the number of weights that have it.
        """
        return round(sparsity * self._counted())

    def _counted(self) -> int:
        """N."""
        sizes = self._sizes
        if self.pattern is not None and self.dense is not None:
            del sizes[self.dense]
        return sum(sizes.values())

    def sparsity(self, removed: int) -> float:
        """Return the sparsity at which so many weights are gone, the reverse of :meth:`count`."""
        return removed / max(1, self._counted())

    def check(self, sparsity: float) -> None:
        """Raise unless the pattern fits the layers, and this sparsity is one they can have."""
        if self.pattern is not None:
            patterned = {n: shape for n, shape in self.shapes.items() if n != self.dense}
            self.pattern.check_shapes(patterned, self.inputs)
        total, most = self.total, sum(self._most().values())
        if self.count(sparsity) >= total:
            raise PruningError(f"sparsity {sparsity} leaves none of the {total} prunable weights")
        if self.count(sparsity) > most:
            raise PruningError(
                f"sparsity {sparsity} removes {self.count(sparsity)} weights, but scope "
                f"{self.scope.name!r} keeps {self.dense!r} dense and so can remove {most} at most"
            )

    def check_start(self, start: Mapping[str, Tensor]) -> None:
        """Raise a ``ValueError`` unless stages can go on from this mask."""
        for name, lost in _lost(start).items():
            if lost > 0 and name == self.dense:
                raise ValueError(
                    f"start has weights of {name!r} removed, which scope {self.scope.name!r} keeps"
                )
            if self.pattern is not None and name != self.dense:
                fewest = self.pattern.fewest(start[name], self.inputs[name])
                if fewest < self.pattern.keep:
                    raise ValueError(
                        f"start keeps only {fewest} weights in a group of {name!r}, too few for "
                        f"pattern {str(self.pattern)!r}"
                    )

    def mark(
        self, saliencies: Mapping[str, Tensor], kept: Mapping[str, Tensor], count: int
    ) -> dict[str, Tensor]:
        """Mark ``count`` more weights to remove, of those that are kept: bool, by name."""
        free = kept
        if self.pattern is not None:
            free = {
                name: kept[name]
                if name == self.dense
                else self.pattern.candidates(saliency, kept[name], self.inputs[name])
                for name, saliency in saliencies.items()
            }
        if self.scope.share is None:
            return select_smallest(saliencies, free, count)
        lost = _lost(kept)
        quota = quotas(
            self._sizes,
            {name: self._share(name, tuple(shape)) for name, shape in self.shapes.items()},
            sum(lost.values()) + count,
            removed=lost,
            most=self._most(),
        )
        marked = {}
        for name, saliency in saliencies.items():
            one = {name: saliency}
            marked |= select_smallest(one, {name: free[name]}, quota[name] - lost[name])
        return marked

    def _share(self, name: str, shape: tuple[int, ...]) -> float:
        assert self.scope.share is not None
        if name in self.stacked:
            return shape[0] * self.scope.share(shape[1:])
        return self.scope.share(shape)


def _lost(kept: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: mask.numel() - int(mask.sum()) for name, mask in kept.items()}


def select_smallest(
    saliencies: Mapping[str, Tensor], kept: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Mark the ``count`` kept weights of smallest saliency, over all parameters together.

    Args:
        saliencies: by parameter name, floating, without NaN; compared in the widest dtype given.
        kept: by parameter name, bool: the weights that may still be removed.
        count: how many to mark, at most the number kept.

    Returns:
        By parameter name, bool: exactly ``count`` entries are True.  Equal saliencies are marked
        by position: first parameter first, then in row-major order.

    >>> s = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    >>> everything = {"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)}
    >>> select_smallest(s, everything, 1)
    {'a': tensor([False,  True]), 'b': tensor([False, False])}
    """
    available = sum(int(mask.sum()) for mask in kept.values())
    if not 0 <= count <= available:
        raise ValueError(f"count must be between 0 and the {available} kept weights, got {count}")
    if count == 0:
        return {name: torch.zeros_like(kept[name]) for name in saliencies}
    dtype = torch.float32
    for saliency in saliencies.values():
        dtype = torch.promote_types(dtype, saliency.dtype)
    threshold, ties = _find_threshold(saliencies, kept, count, dtype)
    marked = {}
    for name, saliency in saliencies.items():
        keys = _ordered_integers(saliency, dtype)
        mark = (keys < threshold) & kept[name]
        if ties > 0:
            tied = ((keys == threshold) & kept[name]).flatten().nonzero().flatten()[:ties]
            mark.view(-1)[tied] = True
            ties -= len(tied)
        marked[name] = mark
    return marked


def _ordered_integers(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers that order as the floats do."""
    integer, bits = _INTEGER[dtype]
    keys = (values.to(dtype) + 0.0).contiguous().view(integer)  # + 0 turns −0 into +0
    # A negative float's magnitude bits order backwards: flip them, leave the sign.
    return torch.where(keys < 0, keys ^ ((1 << (bits - 1)) - 1), keys)


def _find_threshold(
    saliencies: Mapping[str, Tensor], kept: Mapping[str, Tensor], count: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Return the key of the ``count``-th smallest, and how many of that very key to take."""
    prefix, rank = None, count
    for shift in range(_INTEGER[dtype][1] - _DIGIT_BITS, -1, -_DIGIT_BITS):
        below = _histogram(saliencies, kept, dtype, prefix, shift).cumsum(0)
        digit = int(torch.searchsorted(below, rank))
        rank -= int(below[digit - 1]) if digit > 0 else 0
        prefix = digit - _DIGITS // 2 if prefix is None else (prefix << _DIGIT_BITS) | digit
    assert prefix is not None
    return prefix, rank


def _histogram(
    saliencies: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    dtype: torch.dtype,
    prefix: int | None,
    shift: int,
) -> Tensor:
    """Count the digits at ``shift`` of kept weights whose digits before it are ``prefix``.

    None: there are none before it.  This leading digit has the sign, the others are plain bits.
    """
    total = torch.zeros(_DIGITS, dtype=torch.int64)
    for name, saliency in saliencies.items():
        flat, alive = saliency.reshape(-1), kept[name].reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            keys = _ordered_integers(flat[chunk][alive[chunk]], dtype)
            if prefix is None:
                digits = (keys >> shift) + _DIGITS // 2
            else:
                keys = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
                digits = (keys >> shift) & (_DIGITS - 1)
            if digits.numel():
                total += torch.bincount(digits, minlength=_DIGITS).cpu()
    return total
