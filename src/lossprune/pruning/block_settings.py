"""What is asked of a pruning that goes block by block: how weights are chosen and moved."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lossprune.pruning.criteria import CRITERIA, SPARSE_GPT, Criterion
from lossprune.pruning.curvature.inputs import InputMoments, InputSquares
from lossprune.pruning.errors import PruningError
from lossprune.pruning.names import find_in
from lossprune.pruning.patterns import final_sparsity, find_pattern
from lossprune.pruning.reconstruction import reconstruct
from lossprune.pruning.rows import Rows
from lossprune.pruning.scopes import Scope, find_scope
from lossprune.pruning.scoring import Scoring
from lossprune.pruning.selection import Selection

_INPUT_NORM = "input-norm"


@dataclass(frozen=True)
class PrunedWeight:
    """What becomes of a weight.

    Attributes:
        kept: bool, of its shape.
        value: it is 0 where removed.
    """

    kept: Tensor
    value: Tensor


@dataclass(frozen=True)
class BlockPruning:
    """How weights are pruned that are seen a block at a time.

    Attributes:
        criterion: what decides which go; None: the sweep of SparseGPT does.
        selection: of the weights of all blocks.
        amounts: how many go of each, by name.
        moves: whether what is left is moved, layer by layer.
        damping: of the sweep that moves it.
    """

    criterion: Criterion | None
    selection: Selection
    amounts: Mapping[str, int]
    moves: bool
    damping: float

    @property
    def name(self) -> str:
        """What records and masks call the criterion."""
        return SPARSE_GPT if self.criterion is None else self.criterion.name

    @property
    def measures(self) -> bool:
        """Whether inputs are looked at, and examples needed."""
        return self.moves or (self.criterion is not None and self.criterion.statistic is not None)

    def watching(self, weights: Mapping[str, Tensor]) -> tuple[InputSquares, InputMoments | None]:
        """Return what is to watch calls on these weights: norms, and products where they move."""
        zeros = {
            name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
            for name, w in weights.items()
        }
        return InputSquares(weights, zeros), InputMoments(weights) if self.moves else None

    def pruned(
        self,
        weights: Mapping[str, Tensor],
        norms: Mapping[str, Tensor] | None,
        moments: Mapping[str, Tensor] | None,
    ) -> dict[str, PrunedWeight]:
        """Return what becomes of the weights of a block.

        Args:
            weights: θ by parameter name.
            norms: ‖x_j‖₂ by name, of the weights' shapes, where measured.
            moments: X Xᵀ by name, where measured.

        Raises:
            PruningError: a saliency is not finite, or moments have no inverse (named).
        """
        found = {}
        for name, weight in weights.items():
            kept = None if self.criterion is None else self._kept(name, weight, norms)
            value = weight.detach()
            if moments is not None:
                kept, value = self._moved(name, value, kept, moments[name])
            assert kept is not None
            found[name] = PrunedWeight(kept, value.masked_fill(~kept, 0.0))
        return found

    def _kept(self, name: str, weight: Tensor, norms: Mapping[str, Tensor] | None) -> Tensor:
        assert self.criterion is not None
        scores = Scoring(self.criterion, {name: weight}, None, norms).saliencies(0.0)
        everything = {name: torch.ones_like(weight, dtype=torch.bool)}
        one = replace(self.selection, shapes={name: weight.shape})
        return ~one.mark(scores, everything, self.amounts[name])[name]

    def _moved(
        self, name: str, weight: Tensor, kept: Tensor | None, moments: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = Rows(self.selection.inputs[name])
        try:
            moved, mask = reconstruct(
                rows.of(weight),
                moments,
                kept=None if kept is None else rows.of(kept),
                count=self.amounts[name],
                pattern=self.selection.pattern,
                damping=self.damping,
            )
        except PruningError as error:
            raise PruningError(f"{name!r}: {error}") from error
        return rows.back(mask, weight), rows.back(moved.to(weight.dtype), weight)


def block_pruning(
    criterion: str | Criterion,
    *,
    shapes: Mapping[str, torch.Size],
    inputs: Mapping[str, int],
    stacked: frozenset[str],
    sparsity: float | None,
    pattern: str | None,
    scope: str | Scope | None,
    compensate: bool,
    damping: float,
) -> BlockPruning:
    """Return what the arguments of :func:`lossprune.prune_by_block` come to for these weights.

    Raises:
        ValueError: an argument out of range, or a criterion that takes more than a block.
    """
    if not isinstance(compensate, bool):
        raise ValueError(f"compensate must be True or False, got {compensate!r}")
    if not (isinstance(damping, (int, float)) and 0 <= damping < float("inf")):
        raise ValueError(f"damping must be a number of at least 0, got {damping!r}")
    found = None if criterion == SPARSE_GPT else _found(criterion)
    form = find_pattern(pattern)
    final = final_sparsity(sparsity, form)
    if scope is None:
        scope = "row" if found is not None and found.scope == "row" else "layer"
    selection = Selection(find_scope(scope), form, shapes, inputs, stacked=stacked)
    if not selection.scope.has_quotas or selection.scope.keeps_last:
        raise ValueError(
            f"scope {selection.scope.name!r} looks at weights of all blocks together, which are "
            "seen one after the other: take layer, row or another with a quota for each layer"
        )
    if found is None and selection.scope.by_row:
        raise ValueError(
            f"scope {selection.scope.name!r} is not for {SPARSE_GPT}, whose sweep decides for all "
            "rows together: take layer"
        )
    _check_sparsity(final)
    selection.check(final)
    amounts = selection.amounts(selection.amount(final))
    return BlockPruning(found, selection, amounts, compensate or found is None, float(damping))


def _found(criterion: Any) -> Criterion:
    known = {
        name: entry
        for name, entry in CRITERIA.items()
        if not entry.gradient and not entry.curvature and entry.statistic in (None, _INPUT_NORM)
    }
    if not isinstance(criterion, Criterion):
        if isinstance(criterion, str) and criterion in CRITERIA and criterion not in known:
            raise ValueError(
                f"criterion {criterion!r} looks at the whole network, where blocks are seen one "
                f"after the other: take lossprune.prune, or one of {SPARSE_GPT}, {', '.join(known)}"
            )
        return find_in({**known, SPARSE_GPT: CRITERIA["MP"]}, criterion, "criterion")
    if criterion.gradient or criterion.curvature or criterion.statistic not in (None, _INPUT_NORM):
        raise ValueError(
            f"criterion {criterion.name!r} takes more than weights and their inputs, and blocks "
            "are seen one after the other: take lossprune.prune"
        )
    return criterion


def _check_sparsity(sparsity: Any) -> None:
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not (number and 0 <= sparsity < 1):
        raise ValueError(f"sparsity must be a number in [0, 1), got {sparsity!r}")
