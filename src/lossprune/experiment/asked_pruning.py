"""What a run's flags ask of the library: which weights of its network are pruned, and how."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lossprune.data import Dataset
from lossprune.experiment.config import RunConfig
from lossprune.experiment.own_code import criterion_of
from lossprune.experiment.stage_examples import SplitBatches, StageExamples
from lossprune.flags import listed_names
from lossprune.pruning import Mask
from lossprune.pruning.compensation import Compensation
from lossprune.pruning.prunable import prunable_weights
from lossprune.pruning.settings import Pruning

# What the library's messages begin with, and the flag that says it.
_FLAGS = {
    **{'stages="auto"': "pi auto", 'reg="auto"': "reg auto"},
    **{"sparsity": "pr", "stages": "pi"},
    **{name: name for name in ("parameters", "exclude", "pattern", "average", "max_examples")},
    "multiply_adds": "multiply_adds",
}


def weights_of(config: RunConfig, network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that the run's flags choose to prune, by name.

    Raises:
        ValueError: ``--parameters`` or ``--exclude`` chooses none.
    """
    with _naming_flags():
        return prunable_weights(network, *_chosen(config))


def pruning_of(
    config: RunConfig, network: nn.Module, examples: StageExamples, start: Mask | None
) -> Pruning:
    """Return what a run's pruning is to do, from a mask on; nothing is computed yet.

    Raises:
        ValueError: this network cannot be pruned so.
    """
    parameters, exclude = _chosen(config)
    dataset = examples.dataset
    begun = None if start is None else part_of(start, weights_of(config, network))
    with _naming_flags():
        return Pruning(
            network,
            criterion_of(config),
            sparsity=config.sparsity,
            data=examples,
            examples=examples.examples,
            stages=config.stages,
            schedule=config.schedule,
            reg=config.reg,
            average=config.average,
            tolerance=config.tolerance,
            max_examples=config.max_examples,
            seconds=config.pruning_seconds,
            validation=SplitBatches(dataset, dataset.valid) if config.has_budget else None,
            max_loss_increase=config.max_loss_increase,
            max_error_increase=config.max_error_increase,
            parameters=parameters,
            exclude=exclude,
            scope=config.scope,
            pattern=config.pattern,
            multiply_adds=config.multiply_adds,
            estimator=config.estimator,
            seed=config.seed,
            start=begun,
            compensate=config.compensate and Compensation(finish=config.finish),
            recalibrate=None if config.recalibrate == "no" else config.recalibrate,
        )


def check_pruning(
    config: RunConfig, dataset: Dataset, network: nn.Module, start: Mask | None
) -> None:
    """Raise ValueError unless a run that prunes can prune this network, from a mask on."""
    if not config.prunes:
        return
    try:
        pruning_of(config, network, StageExamples(dataset, config.examples, config.seed), start)
    except ValueError as error:
        if start is None:
            raise
        raise ValueError(f"--model_0 {config.start} is pruned already: {error}") from error


def part_of(mask: Mask, weights: Mapping[str, Tensor]) -> Mask:
    """Return the mask of these weights alone; those that it does not know are kept."""
    kept = {
        name: mask[name] if name in mask else torch.ones_like(weight, dtype=torch.bool)
        for name, weight in weights.items()
    }
    return Mask(kept, criterion=mask.criterion)


def joined(mask: Mask, start: Mask | None) -> Mask:
    """Return the mask with what was removed before from weights that it does not know."""
    others = {} if start is None else {name: start[name] for name in start if name not in mask}
    return Mask({**mask, **others}, criterion=mask.criterion) if others else mask


def _chosen(config: RunConfig) -> tuple[list[str] | None, list[str] | None]:
    """Return ``parameters`` and ``exclude`` of the library; None where the flag says nothing."""
    parameters, exclude = config.parameters, config.exclude
    return (
        None if parameters == "all" else listed_names(parameters),
        None if exclude == "none" else listed_names(exclude),
    )


@contextmanager
def _naming_flags() -> Iterator[None]:
    """Let messages about an argument of the library begin with its flag."""
    try:
        yield
    except ValueError as error:
        for argument, flag in _FLAGS.items():
            rest = str(error).removeprefix(argument)
            if rest != str(error) and not rest[0].isalnum():
                raise type(error)(f"--{flag}{rest}") from error
        raise
