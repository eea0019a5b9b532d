"""What a pruning is asked to do: its settings, written and checked once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from lossprune.pruning.automatic import (
    check_average,
    check_budget,
    check_reg,
    check_strides,
    path_of,
)
from lossprune.pruning.choices import Choices
from lossprune.pruning.compensation import Compensation
from lossprune.pruning.criteria import Criterion, find_criterion
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Forward
from lossprune.pruning.curvature.estimators import Estimator, find_estimator
from lossprune.pruning.curvature.examples import check_examples
from lossprune.pruning.curvature.forms import check_batches
from lossprune.pruning.curvature.losses import AnyFunction, Loss, LossFunction, find_loss
from lossprune.pruning.curvature.network import PrunableNetwork
from lossprune.pruning.mask import Mask
from lossprune.pruning.names import find_in
from lossprune.pruning.path import Path
from lossprune.pruning.patterns import final_sparsity, find_pattern
from lossprune.pruning.prunable import (
    check_mask,
    input_dimensions,
    last_layer,
    stacked_weights,
)
from lossprune.pruning.scopes import Scope, find_scope
from lossprune.pruning.selection import Selection
from lossprune.pruning.terms import TERMS
from lossprune.pruning.validation import Budget

# When running statistics may be estimated anew: after every stage, or after the last one.
RECALIBRATED = ("stages", "end")
_FEW_STAGES = 1000  # that any network may be pruned in, a toy with fewer weights as well


@dataclass(frozen=True, eq=False, repr=False)
class Pruning:
    """The arguments of :func:`lossprune.prune`, which says what each is, and what they come to.

    Attributes:
        network: the model with its prunable weights.
        selection: which weights a stage removes.
        path: the sparsity after each stage; at the end as often again as a compensation has
            stages that remove nothing.
        penalty: λ, as given or by the criterion; None: it is chosen at every stage.
        share: β of what is averaged over stages.
        budget: what the pruning may cost on validation data; None: there is no limit.
        compensation: how the weights that are left move; None: they do not.

    Raises:
        ValueError, PruningError: at construction, as :func:`lossprune.prune` before its first
            stage.
    """

    model: nn.Module
    criterion: str | Criterion
    _: KW_ONLY
    sparsity: float | None = None
    data: Iterable[Any] | None = None
    examples: int | None = None
    stages: int | str | None = None
    schedule: str | Sequence[float] = "exponential"
    reg: float | str | None = None
    average: float | None = None
    tolerance: float | None = None
    max_examples: int | None = None
    seconds: float | None = None
    validation: Iterable[Any] | None = None
    max_loss_increase: float | None = None
    max_error_increase: float | None = None
    parameters: Choices | None = None
    exclude: Choices | None = None
    scope: str | Scope = "global"
    pattern: str | None = "unstructured"
    loss: str | Loss | LossFunction = "cross_entropy"
    forward: Forward | None = None
    estimator: str | Estimator = "exact"
    memory: int | None = None
    seed: int | None = None
    sharded: bool = False
    start: Mask | None = None
    compensate: bool | Compensation = False
    recalibrate: str | None = None

    network: PrunableNetwork = field(init=False)
    selection: Selection = field(init=False)
    path: Path = field(init=False)
    penalty: float | None = field(init=False)
    share: float = field(init=False)
    budget: Budget | None = field(init=False)
    compensation: Compensation | None = field(init=False)

    def __post_init__(self) -> None:
        criterion = find_criterion(self.criterion)
        stages = self.stages
        if stages is None and isinstance(self.schedule, str):
            stages = criterion.stages
        pattern = find_pattern(self.pattern)
        budget = check_budget(self.max_loss_increase, self.max_error_increase)
        strides = check_strides(
            stages,
            criterion,
            examples=self.examples,
            tolerance=self.tolerance,
            max_examples=self.max_examples,
            seconds=self.seconds,
        )
        final = None
        if budget is None or self.sparsity is not None or pattern is not None:
            final = final_sparsity(self.sparsity, pattern)
        compensation = _compensation(self.compensate)

        def path(began: float) -> Path:
            return path_of(
                strides=strides,
                schedule=self.schedule,
                stages=stages,
                final=final,
                began=began,
                finish=compensation.finish if compensation else 0,
            )

        found_path = path(0.0)
        network = PrunableNetwork(self.model, self.forward, self.parameters, self.exclude)
        weights = network.weights
        scope = find_scope(self.scope)
        last = last_layer(self.model) if scope.keeps_last else None
        selection = Selection(
            scope,
            pattern,
            {name: weight.shape for name, weight in weights.items()},
            {} if pattern is None else input_dimensions(self.model),
            last if last in weights else None,
            stacked_weights(self.model),
        )
        if self.start is not None:
            _check_start(self.start, weights, selection, final)
            # above it by less than one weight
            began = selection.sparsity(selection.lost(self.start))
            found_path = path(began if final is None else min(final, began))
        penalty = check_reg(self.reg, criterion)
        found = {
            "network": network,
            "selection": selection,
            "path": found_path,
            "penalty": penalty,
            "share": check_average(self.average, automatic=penalty is None or strides is not None),
            "budget": budget,
            "compensation": compensation,
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)
        find_loss(self.loss)
        find_estimator(self.estimator)
        self._check_numbers(sum(weight.numel() for weight in weights.values()))
        self._check_data(criterion)
        self._check_moving()
        self._check_found()
        if final is not None:
            selection.check(final)

    def _check_numbers(self, total: int) -> None:
        check_examples(self.examples)
        if self.seed is not None and not isinstance(self.seed, Integral):
            raise ValueError(f"seed must be a whole number or None, got {self.seed!r}")
        stages = self.path.total
        if stages is not None and stages > max(total, _FEW_STAGES):
            raise ValueError(
                f"stages must be at most {max(total, _FEW_STAGES):,} for {total:,} prunable "
                f"weights, of which each stage is to remove some, got {stages}"
            )

    def _check_data(self, criterion: Criterion) -> None:
        statistic = criterion.statistic
        term = None if statistic is None else find_in(TERMS, statistic, "statistic")
        if self.data is None:
            if criterion.gradient or criterion.curvature or (term and term.needs_data):
                raise ValueError(
                    f"criterion {criterion.name!r} needs data: an iterable of (inputs, targets)"
                )
            if self.examples is not None:
                raise ValueError(
                    f"examples={self.examples!r} asks for examples, but no data is given"
                )
        stages = self.path.total
        if stages != 1 and isinstance(self.data, Iterator):
            asked = self.stages is not None or not isinstance(self.schedule, str)
            raise ValueError(
                f"data is iterated anew at each of {stages or 'several'} stages"
                + ("" if asked else f", what {criterion.name} takes if stages is not given")
                + ", but an iterator can be used only once: give a list or a DataLoader"
                + ("" if asked else ", or stages=1")
            )
        if self.data is not None:
            check_batches(self.data, self.forward)
        if not self.sharded:
            distributed.check_undivided(self.data)

    def _check_moving(self) -> None:
        if self.recalibrate not in (None, *RECALIBRATED):
            raise ValueError(
                f"recalibrate must be None or one of {', '.join(RECALIBRATED)}, got "
                f"{self.recalibrate!r}"
            )
        for name, asked in (
            ("compensate", self.compensation is not None),
            ("recalibrate", self.recalibrate is not None),
        ):
            if asked and self.data is None:
                raise ValueError(f"{name} needs data: an iterable of (inputs, targets)")
        if self.compensation is None:
            return
        for name, weight in self.network.weights.items():
            if weight.is_complex():
                raise ValueError(
                    f"compensate moves real weights, but {name!r} is complex, of {weight.dtype}: "
                    f"leave compensate out, or give exclude={name!r}"
                )
        loss = find_loss(self.loss)
        if isinstance(loss, AnyFunction):
            raise ValueError(
                f"compensate needs the curvature of the loss, but {loss.name} is a plain "
                f"function: give one of {', '.join(loss.known)} or a lossprune.pruning.Loss"
            )

    def _check_found(self) -> None:
        """Check what λ, stages and budgets that are found on the way need."""
        criterion = find_criterion(self.criterion)
        asked = {
            'reg="auto"': self.penalty is None,
            'stages="auto"': self.path.strides is not None,
            "a budget": self.budget is not None,
        }
        for what, given in asked.items():
            if given and self.data is None and not (what == "a budget" and self.validation):
                raise ValueError(f"{what} needs data: an iterable of (inputs, targets)")
            if given and self.sharded:
                raise ValueError(f"{what} is not for data that are sharded among processes")
        if self.share and not (criterion.gradient or criterion.curvature):
            if self.average:
                raise ValueError(
                    f"average={self.average!r} is of gradient and curvature, which "
                    f"{criterion.name} does not measure"
                )
            object.__setattr__(self, "share", 0.0)
        if self.budget is not None and find_pattern(self.pattern) is not None:
            raise ValueError(
                f"a budget ends a pruning where it is spent, but pattern {self.pattern!r} is there "
                "as a whole or not at all: leave one of them out"
            )
        if self.budget is not None and self.recalibrate == "end":
            raise ValueError(
                'recalibrate="end" comes after the last stage, and a budget is judged before: give '
                'recalibrate="stages"'
            )
        if isinstance(self.validation, Iterator):
            raise ValueError(
                "validation is iterated anew for every mask, but an iterator can be used only "
                "once: give a list or a DataLoader"
            )
        if self.validation is not None:
            check_batches(self.validation, self.forward)

    def check_resumed(
        self, completed: int, done: Sequence[Any], averages: Mapping[str, Tensor] | None
    ) -> None:
        """Raise a ``ValueError`` unless stages can go on after so many, of these records."""
        total = self.path.total
        if completed < 0 or (total is not None and completed >= total):
            most = "" if total is None else f" and {total - 1}"
            between = "at least 0" if total is None else "between 0"
            raise ValueError(f"completed must be {between}{most}, got {completed!r}")
        found = total is None or self.penalty is None or self.budget is not None
        if found and len(done) != completed:
            raise ValueError(
                f"what is found on the way goes on from the records of all {completed} completed "
                f"stages, got {len(done)}: give done="
            )
        if completed and self.share and not averages:
            raise ValueError(
                "statistics averaged over stages go on from those of the last stage: give averages="
            )
        if completed and self.budget is not None and self.validation is None:
            raise ValueError(
                "a budget goes on with the data that it was judged on: give validation="
            )

    def check_reached(self, mask: Mask, completed: int) -> None:
        """Raise a ``ValueError`` unless stages can go on from this mask after so many."""
        _check_is_mask(mask, self.network.weights)
        self.selection.check_start(mask)
        if self.path.steps is None:
            return
        selection, sparsity = self.selection, self.path.steps[completed]
        if not selection.reaches(mask, sparsity):
            raise ValueError(
                f"start has {selection.lost(mask)} {selection.unit} removed, but stage "
                f"{completed + 1} removes {selection.amount(sparsity)} in all"
            )


def _compensation(given: Any) -> Compensation | None:
    if given is None or isinstance(given, bool):
        return Compensation() if given else None
    if not isinstance(given, Compensation):
        raise ValueError(
            f"compensate must be True, False or a lossprune.Compensation, got {given!r}"
        )
    return given


def _check_start(
    start: Mask, weights: dict[str, Tensor], selection: Selection, sparsity: float | None
) -> None:
    _check_is_mask(start, weights)
    if sparsity is not None and not selection.reaches(start, sparsity):
        raise ValueError(
            f"start has {start.removed} of {start.total} weights removed, but sparsity "
            f"{sparsity} is {selection.amount(sparsity)} of them: it must be at least "
            f"{selection.sparsity(start.removed)}"
        )


def _check_is_mask(start: Any, weights: dict[str, Tensor]) -> None:
    if not isinstance(start, Mask):
        raise ValueError(f"start must be a lossprune.Mask, got {type(start).__name__}")
    check_mask(start, weights, "start")
