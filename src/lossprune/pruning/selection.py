"""Which weights a stage removes: the smallest saliencies, of what scope and pattern let go."""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import removed_from
from lossprune.pruning.patterns import Pattern, check_inputs_known
from lossprune.pruning.rows import Rows, select_by_row
from lossprune.pruning.scopes import Scope, quotas
from lossprune.pruning.smallest import select_smallest


@dataclass(frozen=True)
class Selection:
    """How much is removed at a sparsity, and which weights that are.

    An amount is a number of weights or, where they have costs, the sum of those.  The weights that
    go then cost what is asked for or more, by less than the last of them costs.

    Attributes:
        scope: whether weights compete globally, or in which layers how many go.
        pattern: N:M, or None.
        shapes: of the weights that are pruned, by parameter name.
        inputs: which of a weight's dimensions its inputs are, by name; for patterns and rows.
        dense: name of the layer that the scope keeps dense, if any.
        stacked: names of the weights that are a matrix for each expert: layers of their own, alike,
            where a scope goes by the shape of a layer.
        costs: c ≥ 0, what a weight of each parameter costs, by name; None: 1 each.
        prices: what the saliencies of each parameter are divided by, by name, so that weights
            compete per price; where that is 0, and removing weights saves nothing, those that have
            a saliency above 0 go last, the others first.  None: by nothing.
        unit: what an amount is a number of.
    """

    scope: Scope
    pattern: Pattern | None
    shapes: Mapping[str, torch.Size]
    inputs: Mapping[str, int]
    dense: str | None = None
    stacked: frozenset[str] = frozenset()
    costs: Mapping[str, int] | None = None
    prices: Mapping[str, float] | None = None
    unit: str = "weights"

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

    def amount(self, sparsity: float) -> int:
        """Return how much is gone at this sparsity: round(κ · N), of N in all.

        With a pattern, N is the number of weights that have it.  Of costs it is at least κ · N, so
        that what is left is at most the share asked for.
        """
        amount = sparsity * self.whole
        if self.costs is None:
            return round(amount)
        return math.ceil(round(amount, 3))  # not one more for what κ is rounded by

    @property
    def whole(self) -> int:
        """N: what all weights come to."""
        sizes = self._sizes
        if self.pattern is not None and self.dense is not None:
            del sizes[self.dense]
        return self._cost(sizes)

    def sparsity(self, amount: int) -> float:
        """Return the sparsity at which so much is gone, the reverse of :meth:`amount`."""
        return amount / max(1, self.whole)

    def lost(self, kept: Mapping[str, Tensor]) -> int:
        """Return how much a mask has removed."""
        return self._cost(_lost(kept))

    def gone(self, kept: Mapping[str, Tensor]) -> float:
        """Return the share that a mask has removed: of the weights, or of what they cost."""
        return self.sparsity(self.lost(kept))

    def removable(self, kept: Mapping[str, Tensor]) -> int:
        """Return how much more could go."""
        return self._cost(self._most()) - self.lost(kept)

    def reaches(self, kept: Mapping[str, Tensor], sparsity: float) -> bool:
        """Whether stages that end with this sparsity may come to a mask with so much removed."""
        if self.costs is None:
            return self.lost(kept) <= self.amount(sparsity)
        # By less than the last weight costs it may be more; of quotas each layer's last is one.
        last = sum if self.scope.has_quotas else max
        return self.lost(kept) < self.amount(sparsity) + max(1, last(self.costs.values()))

    def _cost(self, counts: Mapping[str, int]) -> int:
        if self.costs is None:
            return sum(counts.values())
        return sum(self.costs[name] * count for name, count in counts.items())

    def check(self, sparsity: float) -> None:
        """Raise unless the pattern fits the layers, and this sparsity is one they can have."""
        self._check_shares()
        if self.scope.by_row:
            check_inputs_known(f"scope {self.scope.name!r}", self.shapes, self.inputs)
        if self.pattern is not None:
            patterned = {n: shape for n, shape in self.shapes.items() if n != self.dense}
            self.pattern.check_shapes(patterned, self.inputs)
        amount, most = self.amount(sparsity), self._cost(self._most())
        asked = f"sparsity {sparsity}"
        if self.costs is not None:
            left = self.whole - amount
            asked = f"a share of {1 - sparsity:.6g} of the {self.whole} {self.unit}"
            dearest, cost = max(self.costs.items(), key=lambda pair: pair[1])
            if left < cost:  # the last weight that is left may be one of these
                raise PruningError(
                    f"{asked} is {left}, fewer than the {cost} of one weight of {dearest!r}"
                )
        elif amount >= self.total:
            raise PruningError(f"{asked} leaves none of the {self.total} prunable weights")
        if amount > most:
            raise PruningError(
                f"{asked} removes {amount} {self.unit}, but scope "
                f"{self.scope.name!r} keeps {self.dense!r} dense and so can remove {most} at most"
            )

    def _check_shares(self) -> None:
        for name in self.shapes if self.scope.shares is not None else ():
            share = (self.scope.shares or {}).get(name)
            if share is None or not 0 < share < math.inf:
                raise ValueError(
                    f"scope.shares must have a number above 0 for each pruned weight, got "
                    f"{share!r} for {name!r}: exclude that weight, or give it a share"
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
        self, saliencies: Mapping[str, Tensor], kept: Mapping[str, Tensor], amount: int
    ) -> dict[str, Tensor]:
        """Mark so much more to remove, of the weights that are kept: bool, by name.

        Marked are the fewest, in the order of the scope, that cost at least ``amount``; none where
        that is 0 or less.
        """
        amount = max(0, amount)
        if self.prices is not None:
            saliencies = {name: _per(self.prices[name], s) for name, s in saliencies.items()}
        free = kept
        if self.pattern is not None:
            free = {
                name: kept[name]
                if name == self.dense
                else self.pattern.candidates(saliency, kept[name], self.inputs[name])
                for name, saliency in saliencies.items()
            }
        if not self.scope.has_quotas:
            return select_smallest(saliencies, free, amount, self.costs)
        lost = _lost(kept)
        quota = self._quotas(lost, amount)
        marked = {}
        for name, saliency in saliencies.items():
            count = quota[name] - lost[name]
            if self.scope.by_row:
                rows = Rows(self.inputs[name], name in self.stacked)
                marked[name] = select_by_row(saliency, kept[name], free[name], count, rows)
            else:
                marked |= select_smallest({name: saliency}, {name: free[name]}, count)
        return marked

    def amounts(self, amount: int) -> dict[str, int]:
        """Return how many weights each layer loses of so many, where the scope has quotas."""
        return self._quotas(dict.fromkeys(self.shapes, 0), amount)

    def _quotas(self, lost: Mapping[str, int], amount: int) -> dict[str, int]:
        """How many weights each layer has lost when so much more is gone."""
        shares = {name: self._share(name, tuple(shape)) for name, shape in self.shapes.items()}
        sizes, most, gone = self._sizes, self._most(), sum(lost.values())

        def after(count: int) -> dict[str, int]:
            return quotas(sizes, shares, gone + count, removed=lost, most=most)

        if self.costs is None:
            return after(amount)
        target = self._cost(lost) + amount
        counts = range(sum(most.values()) - gone)
        return after(bisect_left(counts, target, key=lambda count: self._cost(after(count))))

    def _share(self, name: str, shape: tuple[int, ...]) -> float:
        if self.scope.shares is not None:
            return self.scope.shares[name]
        assert self.scope.share is not None
        if name in self.stacked:
            return shape[0] * self.scope.share(shape[1:])
        return self.scope.share(shape)


def _lost(kept: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: removed_from(mask) for name, mask in kept.items()}


def _per(price: float, saliency: Tensor) -> Tensor:
    if price > 0:
        return saliency / price
    return torch.where(saliency > 0, torch.inf, -torch.inf).to(saliency.dtype)
