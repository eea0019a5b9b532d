"""When a training prunes its network, and how far each time."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lossprune.pruning.call import prune_by_stage
from lossprune.pruning.criteria import Criterion, find_criterion
from lossprune.pruning.errors import PruningError
from lossprune.pruning.mask import Mask
from lossprune.pruning.names import did_you_mean
from lossprune.pruning.schedules import sparsities
from lossprune.pruning.stage_record import StageRecord

# What a stage may be told that needs nothing of the stages before it.
_SETTINGS = ("examples", "reg", "parameters", "exclude", "scope", "pattern", "example", "loss")
_SETTINGS += ("forward", "estimator", "memory", "seed", "sharded", "recalibrate")


class GradualPruning:
    """Stages of a pruning at given steps of a training: the network trains on between them.

    After step tᵢ, the i-th of π ``steps``, weights are removed until the sparsity is κᵢ, as stage i
    of :func:`lossprune.prune` does on the weights of that step.  ``steps=[t]`` prunes at once;
    ``steps=range(1000, 9001, 500)`` with ``schedule="cubic"``, κᵢ = κ − κ (1 − i/π)³, is the
    gradual pruning of Zhu and Gupta, "To prune, or not to prune", 2017, by any criterion.

    Args:
        criterion: as in :func:`lossprune.prune`.
        sparsity: κ, of all prunable weights, after the last stage; in [0, 1).
        steps: numbers of optimizer steps, rising; 0 is before the first.
        schedule: as in :func:`lossprune.sparsities`.
        data: batches, as in :func:`lossprune.prune`, in an order that does not change; if not given
            and the criterion looks at data, those of the trainer's own training data set, in an
            order drawn for each stage from ``seed``.
        settings: of :func:`lossprune.prune`: examples, reg (a number), parameters, exclude, scope,
            pattern, example, loss, forward, estimator, memory, seed (0 if not given), sharded and
            recalibrate.

    Raises:
        ValueError: an argument out of range, or no such setting.

    >>> plan = GradualPruning("MP", sparsity=0.875, steps=(10, 20), schedule="cubic")
    >>> plan.sparsities, plan.due(9), plan.due(10), plan.due(99)
    ((0.765625, 0.875), 0, 1, 2)
    """

    def __init__(
        self,
        criterion: str | Criterion,
        *,
        sparsity: float,
        steps: Sequence[int],
        schedule: str | Sequence[float] = "exponential",
        data: Iterable[Any] | None = None,
        **settings: Any,
    ) -> None:
        self.criterion = find_criterion(criterion)
        self.steps = _checked(steps)
        self.sparsities = sparsities(schedule, sparsity, len(self.steps))
        for name in settings:
            if name not in _SETTINGS:
                raise ValueError(
                    f"a pruning while training takes no {name!r}{did_you_mean(name, _SETTINGS)}; "
                    f"it takes {', '.join(_SETTINGS)}"
                )
        if settings.get("reg") == "auto":
            raise ValueError('reg must be a number ≥ 0 in a pruning while training, got "auto"')
        self.data = data
        self.settings = {"seed": 0, **settings}

    def __repr__(self) -> str:
        return (
            f"GradualPruning({self.criterion.name}, sparsity {self.sparsities[-1]} after "
            f"{len(self.steps)} stages, steps {self.steps[0]} to {self.steps[-1]})"
        )

    def due(self, step: int) -> int:
        """Return how many stages are to be done by the end of a step."""
        return sum(at <= step for at in self.steps)

    def stage(
        self, model: nn.Module, mask: Mask | None, completed: int, loader: Any
    ) -> tuple[Mask, StageRecord]:
        """Return mask and record of the next stage, on the weights of ``model`` as they are.

        Args:
            model: in training or not; its weights are left as they are.
            mask: after ``completed`` stages.
            completed: how many stages are done.
            loader: the trainer's own, whose data set is drawn from where no data was given.

        Raises:
            ValueError, PruningError: as :func:`lossprune.prune`.
        """
        data = self.data
        if data is None and self._looks_at_data:
            data = _Drawn(loader, (self.settings["seed"] or 0) + completed)
        settings: dict[str, Any] = {"average": 0.0, **self.settings}
        stages = prune_by_stage(
            model,
            self.criterion,
            sparsity=self.sparsities[-1],
            stages=len(self.steps),
            schedule=self.sparsities,
            data=data,
            start=mask,
            completed=completed,
            **settings,
        )
        return next(stages)

    @property
    def _looks_at_data(self) -> bool:
        criterion = self.criterion
        return criterion.gradient or criterion.curvature or criterion.statistic is not None


def _checked(steps: Sequence[int]) -> tuple[int, ...]:
    steps = tuple(steps)
    whole = all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
    if not steps or not whole or steps[0] < 0 or any(b <= a for a, b in pairwise(steps)):
        raise ValueError(f"steps must be rising whole numbers from 0, got {steps}")
    return steps


class _Drawn:
    """Batches of a loader's data set, in an order that is drawn from a seed alone.

    The loader itself is in the middle of an epoch, and its order belongs to the training.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        dataset = getattr(loader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset):
            what = "no data set" if dataset is None else "one that can be read in order alone"
            raise PruningError(
                f"the trainer's loader, a {type(loader).__name__}, has {what}: give "
                "GradualPruning(data=...), batches to measure the loss on"
            )
        self._loader, self._dataset, self._seed = loader, dataset, seed

    def __iter__(self) -> Iterator[Any]:
        loader = self._loader
        generator = torch.Generator().manual_seed(self._seed)
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        return iter(
            DataLoader(
                self._dataset,
                size or 1,
                sampler=RandomSampler(self._dataset, generator=generator),
                collate_fn=loader.collate_fn,
                generator=generator,
            )
        )
