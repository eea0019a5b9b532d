"""What a pruning is asked to do: its settings, written and checked once."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor, nn

from lossprune.pruning.automatic import (
    Until,
    check_average,
    check_budget,
    check_reg,
    check_strides,
    check_until,
    default_stages,
    path_of,
)
from lossprune.pruning.choices import Choices
from lossprune.pruning.compensation import Compensation
from lossprune.pruning.costs import WeightCosts, share_gone
from lossprune.pruning.criteria import Criterion, find_criterion
from lossprune.pruning.curvature.batch import Forward
from lossprune.pruning.curvature.estimators import Estimator, find_estimator
from lossprune.pruning.curvature.losses import Loss, LossFunction, find_loss
from lossprune.pruning.curvature.network import PrunableNetwork
from lossprune.pruning.mask import Mask
from lossprune.pruning.multiply_adds import MULTIPLY_ADDS, count_multiply_adds
from lossprune.pruning.path import Path
from lossprune.pruning.patterns import final_sparsity, find_pattern
from lossprune.pruning.prunable import (
    input_dimensions,
    last_layer,
    stacked_weights,
)
from lossprune.pruning.requirements import check_target, check_together
from lossprune.pruning.scopes import Scope, find_scope
from lossprune.pruning.selection import Selection
from lossprune.pruning.starting import check_start
from lossprune.pruning.validation import Budget


@dataclass(frozen=True, eq=False, repr=False)
class Pruning:
    """The arguments of :func:`lossprune.prune`, which says what each is, and what they come to.

    Attributes:
        network: the model with its prunable weights.
        selection: which weights a stage removes.
        costs: what weights cost, where that is asked for; None: it is not.
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
    until: Until | None = None
    parameters: Choices | None = None
    exclude: Choices | None = None
    scope: str | Scope | None = None
    pattern: str | None = "unstructured"
    multiply_adds: float | None = None
    example: Any = None
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
    costs: WeightCosts | None = field(init=False)
    path: Path = field(init=False)
    penalty: float | None = field(init=False)
    share: float = field(init=False)
    budget: Budget | None = field(init=False)
    compensation: Compensation | None = field(init=False)

    def __post_init__(self) -> None:
        criterion = find_criterion(self.criterion)
        pattern = find_pattern(self.pattern)
        check_target(self.multiply_adds, self.sparsity, pattern)
        check_until(self.until, self.sparsity, self.multiply_adds)
        budget = check_budget(self.max_loss_increase, self.max_error_increase)
        final = None
        if self.multiply_adds is not None:
            final = share_gone("multiply_adds", self.multiply_adds)
        elif self.sparsity is not None or pattern is not None or not (budget or self.until):
            final = final_sparsity(self.sparsity, pattern)
        stages = self.stages
        if stages is None and isinstance(self.schedule, str):
            stages = default_stages(criterion, final)
        strides = check_strides(
            stages,
            criterion,
            examples=self.examples,
            tolerance=self.tolerance,
            max_examples=self.max_examples,
            seconds=self.seconds,
        )
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
        scope = find_scope(criterion.scope if self.scope is None else self.scope)
        costs = self._counted(network, scope)
        to_cost = None if self.multiply_adds is None else costs
        last = last_layer(self.model) if scope.keeps_last else None
        selection = Selection(
            scope,
            pattern,
            {name: weight.shape for name, weight in weights.items()},
            {} if pattern is None and not scope.by_row else input_dimensions(self.model),
            last if last in weights else None,
            stacked_weights(self.model),
            costs=None if to_cost is None else to_cost.each,
            prices=self._prices(scope, costs, weights),
            unit="weights" if to_cost is None else to_cost.unit,
        )
        if self.start is not None:
            check_start(self.start, weights, selection, final)
            # above it by less than one weight
            began = selection.gone(self.start)
            found_path = path(began if final is None else min(final, began))
        penalty = check_reg(self.reg, criterion)
        # A gradient is noise at most weights; a curvature is none, and would only be late.
        found = penalty is None or strides is not None or final is None
        automatic = criterion.gradient and found
        share = check_average(self.average, automatic=automatic)
        found = {
            "network": network,
            "selection": selection,
            "costs": costs,
            "path": found_path,
            "penalty": penalty,
            "share": share if criterion.gradient or criterion.curvature else 0.0,
            "budget": budget,
            "compensation": compensation,
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)
        find_loss(self.loss)
        find_estimator(self.estimator)
        check_together(self)
        if final is not None:
            selection.check(final)

    def _counted(self, network: PrunableNetwork, scope: Scope) -> WeightCosts | None:
        """What weights cost, if the scope or the target goes by it."""
        if scope.prices is None and scope.price not in (None, MULTIPLY_ADDS):
            raise ValueError(
                f"scope.price must be None or {MULTIPLY_ADDS!r} where scope.prices does not say it "
                f"in numbers, got {scope.price!r}"
            )
        if (scope.price is None or scope.prices) and self.multiply_adds is None:
            if self.example is not None:
                raise ValueError(
                    "example is what multiply-adds are counted on: give multiply_adds= or "
                    f"scope={MULTIPLY_ADDS!r}, or leave it out"
                )
            return None
        return count_multiply_adds(network, self.example, self.data, sharded=self.sharded)

    def _prices(
        self, scope: Scope, costs: WeightCosts | None, weights: Mapping[str, Tensor]
    ) -> Mapping[str, float] | None:
        """What the scope divides saliencies by, if anything."""
        if scope.prices is None:
            return None if costs is None or scope.price is None else costs.prices
        for name in weights:
            price = scope.prices.get(name)
            if price is None or not 0 <= price < math.inf:
                raise ValueError(
                    f"scope.prices must have a number of at least 0 for each pruned weight, got "
                    f"{price!r} for {name!r}: exclude that weight, or give it a price"
                )
        return scope.prices


def _compensation(given: Any) -> Compensation | None:
    if given is None or isinstance(given, bool):
        return Compensation() if given else None
    if not isinstance(given, Compensation):
        raise ValueError(
            f"compensate must be True, False or a lossprune.Compensation, got {given!r}"
        )
    return given
