"""The pruning of a run: its best network, stage by stage, then evaluated."""

from collections.abc import Callable
from dataclasses import asdict

from lossprune.experiment.cache import Cache
from lossprune.experiment.keeping import Keeping
from lossprune.experiment.log import describe, describe_stage
from lossprune.experiment.network_file import weights_sha256
from lossprune.experiment.prepare import StageExamples
from lossprune.experiment.record import EpochRecord
from lossprune.experiment.state import RunState, check_finite
from lossprune.pruning import CRITERIA, Statistics, prune_by_stage


def prune(state: RunState, keeping: Keeping, cache: Cache) -> None:
    """Prune a run's network, or go on after the last stage that is saved.

    Raises:
        DivergedError: a loss of the pruned network is not finite.
    """
    config = state.config
    if not state.is_pruning:
        keeping.bring_best()
        keeping.commit(before_pruning=state.record.best)
    completed = len(state.record.stages)
    if completed < config.stages:
        _prune_stages(state, keeping, cache, completed)
    _apply_mask(state, keeping)


def _prune_stages(state: RunState, keeping: Keeping, cache: Cache, completed: int) -> None:
    config = state.config
    examples = StageExamples(state.dataset, config.examples, config.seed)
    examples.stage = completed + 1
    for mask, stage in prune_by_stage(
        state.network,
        config.criterion,
        sparsity=config.sparsity,
        data=examples,
        examples=config.examples,
        stages=config.stages,
        schedule=config.schedule,
        reg=config.reg,
        estimator=config.estimator,
        seed=config.seed,
        start=state.mask,
        completed=completed,
        recall=lambda stage, measure: _recall(state, cache, stage, measure),
    ):
        state.mask = mask
        done = asdict(stage)
        state.change(stages=(*state.record.stages, done), removed=mask.removed)
        if keeping.due:
            keeping.commit()
        told = describe_stage(done, config.stages).split(": ", 1)[1]
        state.progress.advance("stage", stage.stage, config.stages, told)
        examples.stage += 1


def _recall(
    state: RunState, cache: Cache, stage: int, measure: Callable[[], Statistics]
) -> Statistics:
    """Measure, or share the first stage: from the second one on each run has its own mask."""
    if stage > 1:
        return measure()
    criterion = CRITERIA[state.config.criterion]
    key = (
        weights_sha256(state.network.state_dict()),
        (criterion.gradient, criterion.curvature, state.config.examples),
        state.config.estimator,
        *state.conditions(),
    )
    return cache.get("statistics", key, measure)


def _apply_mask(state: RunState, keeping: Keeping) -> None:
    assert state.mask is not None  # there is at least one stage
    state.mask.apply_(state.network)
    state.restart_optimizer()
    state.choose_training()  # which evaluates, too
    pruned = EpochRecord(state.epoch, state.evaluate())
    keeping.commit(after_pruning=pruned, best=pruned, last=pruned, removed=state.mask.removed)
    state.progress.note(f"pruned: {describe(pruned.scores)}")
    check_finite(pruned.scores, "after pruning")
