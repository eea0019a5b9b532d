"""A stage, tried: what it would remove and come to, before anything is changed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.errors import PruningError
from lossprune.pruning.ladder import ChosenReg, choose_reg
from lossprune.pruning.mask import Mask
from lossprune.pruning.moving import Move, Moving
from lossprune.pruning.scoring import Scoring
from lossprune.pruning.settings import Pruning


@dataclass(frozen=True)
class Attempt:
    """What a stage of one size comes to.

    Attributes:
        amount: removed by it, as the selection counts.
        reached: the mask it ends with.
        predicted: ΔL by the model; None where there is none.
        move: what moves beside the mask.
        loss: over the stage's examples at its end; None without data.
        realised: by how much it rises; None without data.
    """

    amount: int
    reached: Mask
    predicted: float | None
    move: Move
    loss: float | None
    realised: float | None


@dataclass(eq=False)
class Trial:
    """One mask and what was measured there, from which stages of any size are tried.

    Attributes:
        pruning: what is asked for.
        moving: what the stages before have moved.
        mask: the stage's start.
        objective: the loss over the stage's examples.
        scoring: the statistics there, if there are any.
        last: whether a stage that ends with a sparsity is the last that removes weights.
    """

    pruning: Pruning
    moving: Moving
    mask: Mask
    objective: Objective
    scoring: Scoring
    last: Callable[[float], bool] = field(kw_only=True)
    _saliencies: Mapping[str, Tensor] | None = field(default=None, init=False)
    _marked: dict[int, Mapping[str, Tensor]] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def choose_reg(self, aim: float, apart: Objective, rung: int | None) -> ChosenReg:
        """Choose λ for a stage that ends with a sparsity, and take it for all that is tried."""
        amount = self.amount(aim)
        chosen = choose_reg(
            self.scoring,
            lambda saliencies: self.pruning.selection.mark(saliencies, self.mask, amount),
            self.mask,
            apart,
            rung,
        )
        self._saliencies, self._marked = chosen.saliencies, {amount: chosen.marked}
        return chosen

    def to(self, sparsity: float) -> Attempt:
        """Return what a stage that ends with this sparsity comes to."""
        return self.removing(self.amount(sparsity), last=self.last(sparsity))

    @torch.no_grad()
    def removing(self, amount: int, *, last: bool = False) -> Attempt:
        """Return what a stage that removes so much comes to."""
        if self._saliencies is None:
            assert self.pruning.penalty is not None
            self._saliencies = self.scoring.saliencies(self.pruning.penalty)
        marked = self._marked.get(amount)
        if marked is None:
            marked = self.pruning.selection.mark(self._saliencies, self.mask, amount)
        reached = Mask(
            {name: kept ^ marked[name] for name, kept in self.mask.items()},
            criterion=self.scoring.criterion.name,
        )
        statistics, objective = self.scoring.statistics, self.objective
        move = Move(objective, {}, None)
        if statistics is not None:
            move = self.moving.proposed(objective, self.mask, reached, statistics, last=last)
        loss = None if statistics is None else self._loss(move.objective, reached)
        return Attempt(
            amount,
            reached,
            self.scoring.predicted_change(marked),
            move,
            loss,
            None if statistics is None or loss is None else loss - statistics.loss,
        )

    def amount(self, sparsity: float) -> int:
        """Return how much a stage removes that ends with this sparsity."""
        selection = self.pruning.selection
        amount = selection.amount(sparsity) - selection.lost(self.mask)
        if self.pruning.path.steps is None:  # one at least, and one is left at least
            amount = min(max(1, amount), selection.removable(self.mask) - 1)
        return amount

    def _loss(self, objective: Objective, reached: Mask) -> float:
        """Where a size may be taken back, a loss that is not finite is no error but infinite."""
        try:
            return objective.measure(reached).loss
        except PruningError:
            if self.pruning.path.strides is None:
                raise
            return math.inf
