"""The stage loop: measure → score → select → move what is left."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lossprune.progress import Progress, Silent
from lossprune.pruning.apart import split
from lossprune.pruning.averages import Averages
from lossprune.pruning.costs import Cost
from lossprune.pruning.criteria import find_criterion
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.estimators import find_estimator
from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.curvature.running import outside_inference
from lossprune.pruning.curvature.statistics import Statistics
from lossprune.pruning.errors import PruningError
from lossprune.pruning.guessing import told_guess
from lossprune.pruning.judge import Judge
from lossprune.pruning.mask import Mask
from lossprune.pruning.moving import Moving
from lossprune.pruning.names import listed, together
from lossprune.pruning.objectives import objective_of
from lossprune.pruning.pace import Forecast, Pace
from lossprune.pruning.randomness import PrivateRandomness
from lossprune.pruning.scoring import Scoring
from lossprune.pruning.settings import Pruning
from lossprune.pruning.skipped import Skipped, find_skipped, left_out
from lossprune.pruning.stage_record import StageRecord, TakenBack
from lossprune.pruning.starting import check_reached, check_resumed
from lossprune.pruning.strides import stride
from lossprune.pruning.target import Target
from lossprune.pruning.terms import term_of
from lossprune.pruning.trial import Attempt, Trial

# Names that a warning gives in full.
MOST_NAMED = 4


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
        done: records of the completed stages, where λ, stages or a budget are found on the way.
        averages: :attr:`averages` after them, where statistics are averaged.

    Attributes:
        before: the mask that they go on from.

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
        done: Sequence[StageRecord] = (),
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_resumed(pruning, completed, done, averages)
        mask = pruning.start if mask is None else mask
        weights = pruning.network.weights
        if mask is None:
            mask = Mask({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})
        else:
            check_reached(pruning, mask, completed)
        self._pruning = pruning
        self._moving = Moving(pruning, damping, in_place=in_place)
        self._criterion = find_criterion(pruning.criterion)
        self._recall = recall or (lambda stage, measure: measure())
        self._unused: tuple[str, ...] | None = None  # known after the first stage, given data
        self._guess: tuple[float, float | None] | None = None  # as well
        self._costs = None  # of a stage's examples, as the stage before has found them
        total = pruning.path.total
        expected = self._criterion.stages if total is None else total - completed
        self._pace = Pace(expected, progress or Silent(), on_long)
        self._completed, self._done = completed, list(done)
        self._averages = Averages(pruning.share, averages)
        self._judge = Judge.of(pruning, [point for stage in done for point in stage.points or ()])
        self._target = Target(pruning.until)
        self._target.begin(mask)
        self.before = mask.to(pruning.network.device)
        self._results = self._run(self.before)

    def __repr__(self) -> str:
        total = self._pruning.path.total
        stages = "stages" if total is None else f"{total} stages"
        return f"<{self._criterion.name} in {stages}, one at each step>"

    def __next__(self) -> tuple[Mask, StageRecord]:
        return next(self._results)

    @property
    def moved(self) -> dict[str, Tensor]:
        """Parameters and buffers that the stages so far have moved, by name."""
        return dict(self._moving.network.moved)

    @property
    def averages(self) -> dict[str, Tensor]:
        """What is known of the statistics of earlier stages, to go on from; by name."""
        return self._averages.tensors

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

    def cost(self, mask: Mask) -> Cost | None:
        """Return what a mask leaves of what weights cost, where that is known."""
        costs = self._pruning.costs
        return costs.of(mask) if costs is not None and mask else None

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

    def _run(self, mask: Mask) -> Iterator[tuple[Mask, StageRecord]]:
        path, selection = self._pruning.path, self._pruning.selection
        # Processes that prune together draw together: their loaders shuffle alike.
        randomness = PrivateRandomness(distributed.shared_random_state())
        while not (self._judge.spent or self._target.met):
            aim = path.aim(self._now(mask), self._completed, self._done)
            if aim is None or (path.final is None and selection.removable(mask) < 2):
                self._target.end(mask)
                return
            stage = self._completed + 1
            try:
                with randomness:
                    mask, record = self._stage(mask, stage, aim)
            except PruningError as error:
                of = "" if path.total is None else f" of {path.total}"
                raise PruningError(f"stage {stage}{of}: {error}") from error
            self._completed = stage
            self._done.append(record)
            yield mask, record

    @outside_inference()
    def _stage(self, mask: Mask, stage: int, aim: float) -> tuple[Mask, StageRecord]:
        began = time.perf_counter()
        objective = self._objective(stage)
        apart = None
        if self._pruning.penalty is None:
            fit, kept_out = split(list(objective.batches), None, 'reg="auto"', "λ")
            objective, apart = objective.over(fit), kept_out
        # First, as it may find the loss on its way.
        term = term_of(self._criterion, objective, mask)
        statistics = None
        if self._pruning.data is not None:
            measured = self._measure(objective, mask, stage)
            statistics = self._averages.with_(measured, mask.total - mask.removed)
        scoring = Scoring(self._criterion, self._moving.network.weights, statistics, term)
        trial = Trial(
            self._pruning, self._moving, mask, objective, scoring, last=self._is_last(stage)
        )
        rung = self._done[-1].rung if self._done else None
        chosen = None if apart is None else trial.choose_reg(aim, objective.over(apart), rung)
        attempt, taken_back = self._attempted(trial, aim)
        if stage == 1 and self._pruning.start is None and statistics is not None:
            self._guess = statistics.loss, objective.chance
        attempt, points = self._judge.judged(trial, self._target.cut(trial, attempt))
        self._moving.accept(attempt.move)
        self._pace.end()
        self._costs = objective.costs
        selection = self._pruning.selection
        return attempt.reached, StageRecord(
            stage=stage,
            sparsity=attempt.reached.sparsity,
            removed=attempt.reached.removed,
            loss_before=None if statistics is None else statistics.loss,
            loss_after=attempt.loss,
            predicted_change=attempt.predicted,
            realised_change=attempt.realised,
            seconds=distributed.number_of_the_first(time.perf_counter() - began),
            compensation=attempt.move.compensation,
            reg=None if chosen is None else chosen.reg,
            rung=None if chosen is None else chosen.rung,
            tried=None if chosen is None else chosen.tried,
            taken_back=taken_back,
            points=points,
            cost=None if selection.costs is None else 1 - selection.gone(attempt.reached),
        )

    def _now(self, mask: Mask) -> float:
        """The sparsity of a mask, which is the final one where it has all removed of that."""
        path, selection = self._pruning.path, self._pruning.selection
        lost = selection.lost(mask)
        if path.final is not None and lost >= selection.amount(path.final):
            return path.final
        return selection.sparsity(lost)

    def _is_last(self, stage: int) -> Callable[[float], bool]:
        """Whether no weights are removed after this stage, if it ends with a sparsity."""
        path, settings = self._pruning.path, self._pruning.compensation
        total = path.total
        if total is None:
            return lambda aim: aim == path.final
        return lambda aim: stage >= total - (settings.finish if settings else 0)

    def _attempted(self, trial: Trial, aim: float) -> tuple[Attempt, tuple[TakenBack, ...] | None]:
        """Remove as much as is aimed at, or less where the model is found to be too far off."""
        path, selection = self._pruning.path, self._pruning.selection
        attempt, taken_back = trial.to(aim), []
        if path.strides is None:
            return attempt, None
        now = self._now(trial.mask)
        shortest = path.pace(now, self._done)
        while True:
            assert attempt.predicted is not None
            assert attempt.realised is not None
            reached = selection.gone(attempt.reached)
            gone, miss = stride(now, reached), abs(attempt.realised - attempt.predicted)
            shorter = max(shortest, path.strides.after(gone, miss))
            if path.strides.agrees(gone, miss) or shorter > 0.95 * gone or attempt.amount < 2:
                break
            realised = attempt.realised if math.isfinite(attempt.realised) else None
            taken_back.append(TakenBack(reached, attempt.predicted, realised))
            # Of few weights a little less is the same number of them.
            less = trial.amount(1 - (1 - now) * math.exp(-shorter))
            attempt = trial.removing(min(less, attempt.amount - 1))
        if not math.isfinite(attempt.realised):
            raise PruningError("the loss is not finite after the shortest stage that was tried")
        return attempt, tuple(taken_back)

    def _objective(self, stage: int) -> Objective:
        """The loss over the examples of a stage, of which the pace is told."""
        network = self._moving.network
        objective = objective_of(self._pruning, network, stage, self._pace, self._costs)
        self._pace.begin(distributed.own_examples(objective.batches, sharded=objective.sharded))
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
