"""The stage loop: measure → score → select → move what is left."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.progress import Progress, Silent
from lossprune.pruning.compensation import CompensationRecord
from lossprune.pruning.criteria import find_criterion
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.estimators import find_estimator
from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.curvature.running import outside_inference
from lossprune.pruning.curvature.statistics import Statistics
from lossprune.pruning.errors import PruningError
from lossprune.pruning.guessing import told_guess
from lossprune.pruning.mask import Mask
from lossprune.pruning.moving import Moving
from lossprune.pruning.names import listed, together
from lossprune.pruning.objectives import objective_of
from lossprune.pruning.pace import Forecast, Pace
from lossprune.pruning.randomness import PrivateRandomness
from lossprune.pruning.scoring import Scoring
from lossprune.pruning.settings import Pruning
from lossprune.pruning.skipped import Skipped, find_skipped, left_out
from lossprune.pruning.terms import term_of

# Names that a warning gives in full.
MOST_NAMED = 4


@dataclass(frozen=True)
class StageRecord:
    """What one stage did.  Losses are means over the examples that this stage was measured on.

    Attributes:
        stage: 1 for the first.
        sparsity: after the stage, exactly removed / prunable.
        removed: weights removed so far.
        loss_before: at the mask of the stage before; None without data.
        loss_after: at the mask of this stage, on the same examples; None without data.
        predicted_change: the model's ΔL for the weights this stage removed, without the penalty;
            None where the criterion does not model the loss.
        realised_change: ``loss_after − loss_before``; None without data.
        seconds: wall time of the stage.
        compensation: how the weights that are left moved, before ``loss_after``; None where that
            is not asked for.
    """

    stage: int
    sparsity: float
    removed: int
    loss_before: float | None
    loss_after: float | None
    predicted_change: float | None
    realised_change: float | None
    seconds: float
    compensation: CompensationRecord | None = None

    def __repr__(self) -> str:
        parts = [f"sparsity {self.sparsity:.5g}", f"{self.removed:,} removed"]
        if self.loss_before is not None:
            parts.append(f"loss {self.loss_before:.5g} before, {self.loss_after:.5g} after")
        if self.predicted_change is not None:
            parts.append(f"change {self.predicted_change:.3g} predicted")
        if self.compensation is not None:
            parts.append(f"{self.compensation.loss_without:.5g} without compensation")
        return f"StageRecord(stage {self.stage}, {', '.join(parts)}, {self.seconds:.3g} s)"


class Stages(Iterator[tuple[Mask, StageRecord]]):
    """The mask and the record after each stage, computed as they are asked for.

    Args:
        pruning: what is asked for.
        mask: after ``completed`` stages; what the pruning starts from if not given.
        completed: how many stages are done.
        recall: as in :func:`lossprune.pruning.prune_by_stage`.
        progress: is told how many examples of a stage are measured.
        on_long: gets the forecast, once, where exact curvature will take long.
        damping: of a compensation, λ after ``completed`` stages.
        in_place: whether the network itself gets the weights and statistics that a stage moves;
            else it stays as it is, and :attr:`moved` has them.

    Raises:
        ValueError: as there.
    """

    def __init__(
        self,
        pruning: Pruning,
        mask: Mask | None = None,
        completed: int = 0,
        recall: Callable[[int, Callable[[], Statistics]], Statistics] | None = None,
        progress: Progress | None = None,
        on_long: Callable[[Forecast], None] = lambda forecast: None,
        *,
        damping: float | None = None,
        in_place: bool = False,
    ) -> None:
        if not 0 <= completed < len(pruning.steps):
            last = len(pruning.steps) - 1
            raise ValueError(f"completed must be between 0 and {last}, got {completed!r}")
        mask = pruning.start if mask is None else mask
        weights = pruning.network.weights
        if mask is None:
            mask = Mask({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})
        else:
            pruning.check_reached(mask, completed)
        self._pruning = pruning
        self._moving = Moving(pruning, damping, in_place=in_place)
        self._criterion = find_criterion(pruning.criterion)
        self._recall = recall or (lambda stage, measure: measure())
        self._unused: tuple[str, ...] | None = None  # known after the first stage, given data
        self._guess: tuple[float, float | None] | None = None  # as well
        self._pace = Pace(len(pruning.steps) - completed, progress or Silent(), on_long)
        self._results = self._run(mask.to(pruning.network.device), completed)

    def __repr__(self) -> str:
        return f"<{self._criterion.name} in {len(self._pruning.steps)} stages, one at each step>"

    def __next__(self) -> tuple[Mask, StageRecord]:
        return next(self._results)

    @property
    def moved(self) -> dict[str, Tensor]:
        """Parameters and buffers that the stages so far have moved, by name."""
        return dict(self._moving.network.moved)

    @property
    def skipped(self) -> dict[str, Skipped]:
        """As in :class:`PruningResult`."""
        return find_skipped(self._pruning.model, self._pruning.network.names)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of matrices that are considerable, and left out without anybody asking for it."""
        if self._pruning.parameters is not None or self._pruning.exclude is not None:
            return ()
        return left_out(self.skipped, self._pruning.selection.total)

    def told_left_out(self) -> str:
        """Return what to tell of them, in one sentence without its end."""
        size = sum(self.skipped[name].size for name in self.left_out)
        return (
            f"{size:,} numbers in {listed(self.left_out, most=MOST_NAMED)} are in matrices that "
            f"are not pruned by default, beside {self._pruning.selection.total:,} weights that are"
        )

    @property
    def unused(self) -> tuple[str, ...]:
        """As in :class:`PruningResult`; empty before the first stage."""
        return self._unused or ()

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Names to exclude for all that is unused: of whole modules where possible."""
        return together(self.unused, self._pruning.network.names)

    def told_unused(self) -> str:
        """Return what to tell of the weights that are unused, in one sentence without its end."""
        sizes = {name: shape.numel() for name, shape in self._pruning.selection.shapes.items()}
        gone, total = sum(sizes[name] for name in self.unused), sum(sizes.values())
        return (
            f"the outputs do not depend on {listed(self.unused, most=MOST_NAMED)} in evaluation "
            f"mode ({gone:,} of {total:,} prunable weights): they count in the sparsity, and "
            "criteria that look at the loss remove them first"
        )

    def told_guess(self) -> str | None:
        """Return what to tell, after the first stage, of a network that knows no more than chance.

        Nothing of a criterion that is made for networks before training, of a network that was
        pruned before, and of a loss that is not cross-entropy.
        """
        if self._guess is None or self._criterion.before_training:
            return None
        return told_guess(*self._guess)

    def _run(self, mask: Mask, completed: int) -> Iterator[tuple[Mask, StageRecord]]:
        steps = self._pruning.steps
        # Processes that prune together draw together: their loaders shuffle alike.
        randomness = PrivateRandomness(distributed.shared_random_state())
        for stage, sparsity in enumerate(steps[completed:], start=completed + 1):
            try:
                with randomness:
                    mask, record = self._stage(mask, stage, sparsity)
            except PruningError as error:
                raise PruningError(f"stage {stage} of {len(steps)}: {error}") from error
            yield mask, record

    @outside_inference()
    def _stage(self, mask: Mask, stage: int, sparsity: float) -> tuple[Mask, StageRecord]:
        began = time.perf_counter()
        objective = self._objective(stage)
        given = self._pruning.data is not None
        # First, as it may find the loss on its way.
        term = term_of(self._criterion, objective, mask)
        statistics = self._measure(objective, mask, stage) if given else None
        marked, predicted = self._choose(mask, sparsity, statistics, term)
        reached = Mask(
            {name: kept & ~marked[name] for name, kept in mask.items()},
            criterion=self._criterion.name,
        )
        before = None if statistics is None else statistics.loss
        step = None
        if statistics is not None:
            objective, step = self._moving.move(objective, mask, reached, statistics, stage)
        after = objective.measure(reached).loss if given else None
        self._pace.end()
        if before is not None and stage == 1 and self._pruning.start is None:
            self._guess = before, objective.chance
        return reached, StageRecord(
            stage=stage,
            sparsity=reached.sparsity,
            removed=reached.removed,
            loss_before=before,
            loss_after=after,
            predicted_change=predicted,
            realised_change=None if before is None or after is None else after - before,
            seconds=time.perf_counter() - began,
            compensation=step,
        )

    def _objective(self, stage: int) -> Objective:
        """The loss over the examples of a stage, of which the pace is told."""
        objective = objective_of(self._pruning, self._moving.network, stage, heard=self._pace)
        sharded = self._pruning.sharded
        self._pace.begin(distributed.own_examples(objective.batches, sharded=sharded))
        return objective

    def _measure(self, objective: Objective, mask: Mask, stage: int) -> Statistics:
        estimator = find_estimator(self._pruning.estimator) if self._criterion.curvature else None
        statistics = self._recall(
            stage,
            lambda: objective.measure(mask, gradient=self._criterion.gradient, estimator=estimator),
        )
        if self._unused is None:
            self._unused = statistics.unused
        return statistics

    @torch.no_grad()
    def _choose(
        self,
        mask: Mask,
        sparsity: float,
        statistics: Statistics | None,
        term: Mapping[str, Tensor] | None,
    ) -> tuple[Mapping[str, Tensor], float | None]:
        """The weights that go next, and the change of the loss that is predicted for it."""
        pruning = self._pruning
        scoring = Scoring(self._criterion, self._moving.network.weights, statistics, term)
        amount = pruning.selection.amount(sparsity) - pruning.selection.lost(mask)
        marked = pruning.selection.mark(scoring.saliencies(pruning.penalty), mask, amount)
        return marked, scoring.predicted_change(marked)
