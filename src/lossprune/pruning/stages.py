"""The stage loop: measure → score → select."""

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.pruning.criteria import Criterion, find_criterion
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch, Forward
from lossprune.pruning.curvature.estimators import Estimator, find_estimator
from lossprune.pruning.curvature.examples import check_examples, device_of, take
from lossprune.pruning.curvature.losses import FullLoss, Loss, LossFunction, find_loss
from lossprune.pruning.curvature.measure import Statistics, mean_loss, measure
from lossprune.pruning.curvature.plainly import outside_inference
from lossprune.pruning.curvature.reach import together
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.names import listed
from lossprune.pruning.patterns import Pattern, final_sparsity, find_pattern
from lossprune.pruning.prunable import (
    Choices,
    check_mask,
    input_dimensions,
    last_layer,
    prunable_weights,
)
from lossprune.pruning.randomness import PrivateRandomness
from lossprune.pruning.result import PruningResult, StageRecord
from lossprune.pruning.schedules import sparsities
from lossprune.pruning.scopes import Scope, find_scope
from lossprune.pruning.scoring import predicted_change, saliencies
from lossprune.pruning.selection import Selection
from lossprune.pruning.statistics import Setting, find_statistic

# Names that a warning gives in full.
_NAMED = 4
_FEW_STAGES = 1000  # that any network may be pruned in, a toy with fewer weights as well


def prune(
    model: nn.Module,
    criterion: str | Criterion,
    *,
    sparsity: float | None = None,
    data: Iterable[Any] | None = None,
    examples: int | None = None,
    stages: int | None = None,
    schedule: str | Sequence[float] = "exponential",
    reg: float = 0.0,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
    scope: str | Scope = "global",
    pattern: str | None = "unstructured",
    loss: str | Loss | LossFunction = "cross_entropy",
    forward: Forward | None = None,
    estimator: str | Estimator = "exact",
    memory: int | None = None,
    seed: int | None = None,
    sharded: bool = False,
    start: Mask | None = None,
) -> PruningResult:
    """Find which weights of ``model`` to remove so that a model of its loss rises least.

    In each stage i the statistics that the criterion needs are measured at θ ⊙ m of the stage
    before, on fresh examples; every weight that is left gets its saliency + ½ λ θ²; and the
    smallest over all layers together, or as ``scope`` and ``pattern`` say, are removed until
    round(κᵢ · N) are gone.  θ itself never changes, and a weight once removed stays removed.
    Weights that are exactly 0 go before all others, whatever the criterion; equal ones by position.
    Source: Laurent et al., "Revisiting Loss Modelling for Unstructured Pruning", 2020.

    Args:
        model: left unchanged; apply the mask with ``result.mask.apply_(model)``.
        criterion: a name in ``lossprune.CRITERIA`` or a :class:`Criterion`.
        sparsity: κ, the fraction of the prunable weights removed at the end, in [0, 1); with an
            N:M pattern it is 1 − N/M and may be left out.
        data: iterable of batches: (inputs, targets), dicts of the network's keyword arguments and
            ``labels``, or whatever ``forward`` understands; iterated anew at each stage, so an
            iterator will not do for several.  A criterion that needs no statistics (MP) does
            without; given data, its stages record their losses.
        examples: how many to read a stage, exactly; None reads all.  A stage holds its examples
            until it ends, where the iterable puts them.
        stages: π; 1 if not given, but for a criterion that says otherwise (SynFlow: 100).
        schedule: ``"exponential"``, ``"linear"``, or a rising sequence of sparsities.
        reg: λ ≥ 0, the step-size penalty.
        parameters: which weights to prune, if not those of all linear and convolution layers: a
            name, glob pattern, type of module, module, function of (name, parameter, module), or a
            sequence of these; see :func:`lossprune.pruning.prunable_weights`.
        exclude: which of them not, in the same ways, or ``"first and last"`` for the first and
            last layer that the network registers.
        scope: which weights compete: a name in ``SCOPES`` or a :class:`Scope`.
        pattern: ``"unstructured"``, or ``"N:M"``, such as ``"2:4"``, to keep N in every group of M
            weights that are neighbours along a layer's inputs.
        loss: a name in ``LOSSES``, a :class:`Loss`, or, for criteria that need no curvature and
            for ``estimator="empirical-fisher"``, any function of (outputs, targets).
        forward: ``forward(model, batch)`` gives (outputs, targets) of batches of any other form;
            as in :func:`measure`.
        estimator: of the GGN diagonal: a name in ``ESTIMATORS`` or an :class:`Estimator`.
        memory: bytes that a measurement may take at once; as in :func:`measure`.
        seed: of what an estimator or a criterion draws, for each stage apart; if not given it
            draws from torch's global generator as it stands, and leaves that as it was.
        sharded: whether the data of each process of a ``torch.distributed`` group is its own share;
            as in :func:`measure`.
        start: the mask of a network that is pruned already, to prune it further: what it removes
            stays removed, and the schedule begins at its sparsity κ₀ (see
            :func:`lossprune.sparsities`).  ``sparsity`` is still of all prunable weights.

    Weights that the network's outputs do not depend on in evaluation mode, such as those of a copy
    or a head that is used in training only, count in the sparsity, and criteria that look at the
    loss remove them first: a warning and ``result.unused`` name them, where there is data.

    Under an initialised ``torch.distributed`` group every process must call this with the same
    model, and with the same data or ``sharded``; they share the work, and each gets the same mask.

    Raises:
        ValueError: an argument out of range; ``start`` is not a mask of this network, or has more
            removed than ``sparsity`` asks for.
        PruningError: no weight would be left; the data does not do (see :func:`measure`); a loss,
            gradient, curvature or saliency is not finite.  The stage is named.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    >>> batches = [(torch.randn(32, 8), torch.arange(32) % 4)]
    >>> result = prune(model, "QM", sparsity=0.75, data=batches, stages=3)
    >>> result.mask
    Mask(144 of 192 weights removed, 2 parameters)
    >>> [stage.removed for stage in result.stages]
    [71, 116, 144]
    """
    pruning = prune_by_stage(
        model,
        criterion,
        sparsity=sparsity,
        data=data,
        examples=examples,
        stages=stages,
        schedule=schedule,
        reg=reg,
        parameters=parameters,
        exclude=exclude,
        scope=scope,
        pattern=pattern,
        loss=loss,
        forward=forward,
        estimator=estimator,
        memory=memory,
        seed=seed,
        sharded=sharded,
        origin=start,
    )
    mask, records = Mask({}), []
    for after, record in pruning:
        if not records and pruning.unused:
            names = list(pruning.unused_modules)
            instead = f"exclude={names if len(names) <= _NAMED else 'result.unused'}"
            warnings.warn(f"{pruning.told_unused()}; {instead} leaves them out", stacklevel=2)
        mask = after
        records.append(record)
    return PruningResult(mask, tuple(records), pruning.unused)


def prune_by_stage(
    model: nn.Module,
    criterion: str | Criterion,
    *,
    sparsity: float | None = None,
    data: Iterable[Any] | None = None,
    examples: int | None = None,
    stages: int | None = None,
    schedule: str | Sequence[float] = "exponential",
    reg: float = 0.0,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
    scope: str | Scope = "global",
    pattern: str | None = "unstructured",
    loss: str | Loss | LossFunction = "cross_entropy",
    forward: Forward | None = None,
    estimator: str | Estimator = "exact",
    memory: int | None = None,
    seed: int | None = None,
    sharded: bool = False,
    start: Mask | None = None,
    completed: int = 0,
    origin: Mask | None = None,
    recall: Callable[[int, Callable[[], Statistics]], Statistics] | None = None,
) -> "Stages":
    """Prune as :func:`prune`, giving mask and record after every stage.

    What is returned is an iterator; after its first step ``unused`` is as in
    :class:`PruningResult`.

    ``start`` is the mask after ``completed`` stages, to go on from there: the masks are those of
    a pruning that was never stopped, if the data gives the same examples at the same stage.

    ``origin`` is the mask before the first stage, :func:`prune`'s ``start``, where not all weights
    were there: the schedule begins at its sparsity.

    ``recall(stage, measure)`` gives a stage's statistics where given: ``measure()``, or what that
    returned before for the same network, mask, examples and criterion.

    Raises:
        ValueError: as :func:`prune`, at once; ``completed`` is not below the number of stages, or
            ``start`` is not a mask of this network, or has more removed than the next stage ends
            with.
        PruningError: as :func:`prune`, when the stage is reached.
    """
    criterion = find_criterion(criterion)
    if stages is None and isinstance(schedule, str):
        stages = criterion.stages
    structure = find_pattern(pattern)
    final = final_sparsity(sparsity, structure)
    steps = sparsities(schedule, final, stages)
    if not 0 <= completed < len(steps):
        raise ValueError(f"completed must be between 0 and {len(steps) - 1}, got {completed!r}")
    weights = prunable_weights(model, parameters, exclude)
    selection = _selection(model, weights, find_scope(scope), structure)
    if origin is not None:
        _check_origin(origin, weights, selection, final)
        began = min(final, selection.sparsity(origin.removed))  # above it by less than one weight
        steps = sparsities(schedule, final, stages, began)
        start = origin if start is None else start
    pruning = _Pruning(
        model,
        weights,
        None if parameters is None and exclude is None else tuple(weights),
        selection,
        criterion,
        data,
        examples,
        reg,
        find_loss(loss),
        forward,
        find_estimator(estimator),
        memory,
        seed,
        sharded,
        recall,
    )
    pruning.check(steps)
    if start is None:
        start = Mask({name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()})
    else:
        pruning.check_start(start, steps, completed)
    return Stages(pruning, pruning.run(start.to(pruning.device), steps, completed))


def _selection(
    model: nn.Module, weights: Mapping[str, Tensor], scope: Scope, pattern: Pattern | None
) -> Selection:
    last = last_layer(model) if scope.keeps_last else None
    return Selection(
        scope,
        pattern,
        {name: weight.shape for name, weight in weights.items()},
        {} if pattern is None else input_dimensions(model),
        last if last in weights else None,
    )


def _check_origin(
    origin: Mask, weights: Mapping[str, Tensor], selection: Selection, sparsity: float
) -> None:
    _check_start_mask(origin, weights)
    if origin.removed > selection.count(sparsity):
        raise ValueError(
            f"start has {origin.removed} of {origin.total} weights removed, but sparsity "
            f"{sparsity} is {selection.count(sparsity)} of them: it must be at least "
            f"{selection.sparsity(origin.removed)}"
        )


def _check_start_mask(start: Mask, weights: Mapping[str, Tensor]) -> None:
    if not isinstance(start, Mask):
        raise ValueError(f"start must be a lossprune.Mask, got {type(start).__name__}")
    check_mask(start, weights, "start")


class _Pruning:
    """One pruning under way."""

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        names: Sequence[str] | None,
        selection: Selection,
        criterion: Criterion,
        data: Iterable[Any] | None,
        examples: int | None,
        reg: float,
        loss: FullLoss,
        forward: Forward | None,
        estimator: Estimator,
        memory: int | None,
        seed: int | None,
        sharded: bool,
        recall: Callable[[int, Callable[[], Statistics]], Statistics] | None,
    ) -> None:
        self.model = model
        self.weights = weights
        self.device = device_of(weights.values())
        self.names = names  # None for all, which is quicker to find
        self.selection = selection
        self.criterion = criterion
        self.data = data
        self.examples = examples
        self.reg = reg
        self.loss = loss
        self.forward = forward
        self.estimator = estimator
        self.memory = memory
        self.seed = seed
        self.sharded = sharded
        self.recall = recall or (lambda stage, measure: measure())
        self.unused: tuple[str, ...] | None = None  # known after the first stage, given data

    def check(self, steps: Sequence[float]) -> None:
        if not (isinstance(self.reg, (int, float)) and 0 <= self.reg <= sys.float_info.max):
            raise ValueError(f"reg must be a number of at least 0, got {self.reg!r}")
        check_examples(self.examples)
        if self.seed is not None and not isinstance(self.seed, Integral):
            raise ValueError(f"seed must be a whole number or None, got {self.seed!r}")
        total = sum(weight.numel() for weight in self.weights.values())
        if len(steps) > max(total, _FEW_STAGES):
            raise ValueError(
                f"stages must be at most {max(total, _FEW_STAGES):,} for {total:,} prunable "
                f"weights, of which each stage is to remove some, got {len(steps)}"
            )
        if self.data is None:
            statistic = self.criterion.statistic
            if (
                self.criterion.gradient
                or self.criterion.curvature
                or (statistic is not None and find_statistic(statistic).needs_data)
            ):
                raise ValueError(
                    f"criterion {self.criterion.name!r} needs data: an iterable of "
                    "(inputs, targets)"
                )
            if self.examples is not None:
                raise ValueError(
                    f"examples={self.examples!r} asks for examples, but no data is given"
                )
        if len(steps) > 1 and isinstance(self.data, Iterator):
            raise ValueError(
                f"data is iterated anew at each of {len(steps)} stages, but an iterator can be "
                "used only once: give a list or a DataLoader"
            )
        if not self.sharded:
            distributed.check_undivided(self.data)
        self.selection.check(steps[-1])

    def check_start(self, start: Mask, steps: Sequence[float], completed: int) -> None:
        _check_start_mask(start, self.weights)
        self.selection.check_start(start)
        count = self.selection.count(steps[completed])
        if start.removed > count:
            raise ValueError(
                f"start has {start.removed} weights removed, but stage {completed + 1} removes "
                f"{count} in all"
            )

    def run(
        self, mask: Mask, steps: tuple[float, ...], completed: int
    ) -> Iterator[tuple[Mask, StageRecord]]:
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
        batches: list[Batch] = []
        statistics = before = after = None
        if self.data is not None:
            with distributed.together(self.device):
                batches = list(take(self.data, self.examples, self.forward, sharded=self.sharded))
            kept = mask  # as it is now: the name goes on to this stage's own mask
            statistics = self.recall(stage, lambda: self._measure(batches, kept, stage))
            before = statistics.loss
            if self.unused is None:
                self.unused = statistics.unused
        other = self._measure_other(batches, mask, stage)
        with torch.no_grad():
            marked = self.selection.mark(
                saliencies(self.criterion, self.weights, statistics, self.reg, other),
                mask,
                self.selection.count(sparsity) - mask.removed,
            )
            predicted = predicted_change(self.criterion, self.weights, statistics, marked, other)
        mask = Mask(
            {name: kept & ~marked[name] for name, kept in mask.items()},
            criterion=self.criterion.name,
        )
        if statistics is not None:
            after = mean_loss(
                self.model,
                batches,
                mask=mask,
                loss=self.loss,
                memory=self.memory,
                forward=self.forward,
                parameters=self.names,
                sharded=self.sharded,
            )
        return mask, StageRecord(
            stage=stage,
            sparsity=mask.sparsity,
            removed=mask.removed,
            loss_before=before,
            loss_after=after,
            predicted_change=predicted,
            realised_change=None if before is None or after is None else after - before,
            seconds=time.perf_counter() - began,
        )

    def _measure(self, batches: list[Batch], mask: Mask, stage: int) -> Statistics:
        return measure(
            self.model,
            batches,
            mask=mask,
            loss=self.loss,
            forward=self.forward,
            gradient=self.criterion.gradient,
            ggn_diagonal=self.criterion.curvature,
            estimator=self.estimator,
            memory=self.memory,
            generator=self._generator(stage),
            parameters=self.names,
            sharded=self.sharded,
        )

    def _measure_other(
        self, batches: list[Batch], mask: Mask, stage: int
    ) -> Mapping[str, Tensor] | None:
        """What the criterion ranks by instead of the curvature, if anything."""
        if self.criterion.statistic is None:
            return None
        setting = Setting(
            self.model,
            self.weights,
            mask,
            batches,
            self.loss,
            self.forward,
            self.memory,
            self._generator(stage) or torch.default_generator,
            self.sharded,
        )
        with distributed.together(self.device):
            found = find_statistic(self.criterion.statistic).compute(setting)
        found = {name: values.contiguous() for name, values in found.items()}
        distributed.as_the_first_has_(found.values())
        return found

    def _generator(self, stage: int) -> torch.Generator | None:
        if self.seed is None:
            return None
        return torch.Generator().manual_seed(_mixed(int(self.seed), stage))


class Stages(Iterator[tuple[Mask, StageRecord]]):
    """The mask and the record after each stage, computed as they are asked for."""

    def __init__(self, pruning: _Pruning, stages: Iterator[tuple[Mask, StageRecord]]) -> None:
        self._pruning = pruning
        self._stages = stages

    def __next__(self) -> tuple[Mask, StageRecord]:
        return next(self._stages)

    @property
    def unused(self) -> tuple[str, ...]:
        """As in :class:`PruningResult`; empty before the first stage."""
        return self._pruning.unused or ()

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Names to exclude for all that is unused: of whole modules where possible."""
        return together(self.unused, self._pruning.weights)

    def told_unused(self) -> str:
        """Return what to tell of the weights that are unused, in one sentence without its end."""
        gone = sum(self._pruning.weights[name].numel() for name in self.unused)
        total = sum(weight.numel() for weight in self._pruning.weights.values())
        return (
            f"the outputs do not depend on {listed(self.unused, most=_NAMED)} in evaluation mode "
            f"({gone:,} of {total:,} prunable weights): they count in the sparsity, and criteria "
            "that look at the loss remove them first"
        )


def _mixed(seed: int, stage: int) -> int:
    """A seed of the stage's own, far from those of other stages and of seeds close by."""
    return (seed * 1_000_003 + stage * 998_244_353) % 2**63
