"""One run on a page: train or load, prune, fine-tune, record; killed at any moment, it goes on.

The run tells what it needs (:class:`Request`), and whoever drives it gives it that:
:mod:`lossprune.experiment.runner` to one alone, :mod:`lossprune.experiment.group` to many together.
"""

from collections.abc import Callable, Generator
from enum import Enum, auto

from lossprune.experiment.asked_pruning import joined, part_of, pruning_of
from lossprune.experiment.log import in_words, stage_in_words
from lossprune.experiment.network_file import weights_sha256
from lossprune.experiment.own_code import criterion_of
from lossprune.experiment.prepare import Cache
from lossprune.experiment.record import EpochRecord, RunStatus, Scores
from lossprune.experiment.stage_dict import stage_dict, stage_of
from lossprune.experiment.stage_examples import StageExamples
from lossprune.experiment.state import RunState, check_finite
from lossprune.experiment.store import RunStore
from lossprune.flags import AUTO
from lossprune.pruning import Mask, Statistics
from lossprune.pruning.norms import tracking_norms
from lossprune.pruning.stages import Stages
from lossprune.training import DivergedError


class Request(Enum):
    """What a run needs before it goes on."""

    TRAIN = auto()  # the next epoch: its scores or how it diverged, and the seconds it took
    WEIGHTS_TO_COPY = auto()  # network and optimizer as they were trained: they are the best so far
    WEIGHTS_TO_SAVE = auto()  # the same, to be written
    PRUNING = auto()  # the time for it
    CHECKPOINT = auto()  # to go back there, with a network that nobody else trains


Trained = tuple[Scores | DivergedError, float]
Story = Generator[Request, Trained | None, None]


def tell(state: RunState, store: RunStore, cache: Cache) -> Story:
    """Do a run from its start, or its checkpoint, to its end."""
    settled = store.settled()
    if settled is not None:  # by another process, while this one was loading the data
        state.take_record(settled)
        return
    try:
        if not _restore(state, store):
            _start(state, store, cache)
        if not state.is_trained:
            state.progress.advance("epoch", state.epoch, state.config.epochs)
        while True:
            if state.prunes_now:
                yield Request.PRUNING
                _prune(state, store, cache)
            if state.is_trained:
                break
            try:
                yield from _epoch(state, store)
            except DivergedError:
                if store.saved_epoch == state.epoch:
                    raise
                # It leaves the network of the epoch before, and nobody has that any more: there
                # once more from the checkpoint, now with one after every epoch.
                yield Request.CHECKPOINT
                store.seconds = 0.0
                _restore(state, store)
        _settle(state, store, RunStatus.FINISHED)
    except DivergedError as error:
        _settle(state, store, RunStatus.DIVERGED, str(error))


def _epoch(state: RunState, store: RunStore) -> Story:
    """Train an epoch, and save it where it is time to; DivergedError: nothing has come of it."""
    trained = yield Request.TRAIN
    assert trained is not None
    scores, seconds = trained
    if isinstance(scores, DivergedError):
        raise DivergedError(f"epoch {state.epoch + 1}: {scores}")
    best = state.add_epoch(scores, seconds)
    state.progress.advance("epoch", state.epoch, state.config.epochs, in_words(scores))
    stops = state.is_trained or state.prunes_now
    if stops or store.due:
        yield Request.WEIGHTS_TO_SAVE
        store.save(state.checkpoint(), derived=stops or store.derives_now)
    elif best:
        yield Request.WEIGHTS_TO_COPY
        store.keep_best(state.network.state_dict())


def _start(state: RunState, store: RunStore, cache: Cache) -> None:
    computed = state.config.amp, state.config.compiled
    key = (state.record.start.weights_sha256, computed, *state.conditions())
    scores = cache.get("scores", key, state.evaluate)
    state.progress.note(f"start: {in_words(scores)}")
    if state.mask is not None:
        store.save_mask(state.mask)
        if not state.prunes_now:
            state.choose_training()
    now = EpochRecord(0, scores)
    _commit(state, store, best=now, last=now)
    check_finite(scores, "of the start network")


def _restore(state: RunState, store: RunStore) -> bool:
    """Bring the run to where its checkpoint is; return whether there is one."""
    own = state.record.own
    saved = store.restore(state.record.start, own.get("data"))
    if saved is None:
        return False
    for flag, digest in own.items():
        if saved.record.own.get(flag, digest) != digest:
            state.progress.note(f"note: the code of --{flag} has changed since this run began")
    state.go_on_from(saved)
    store.derive(state.checkpoint())
    pruning = state.record.is_pruning
    where = f"pruning stage {len(state.record.stages)}" if pruning else f"epoch {state.epoch}"
    state.progress.note(f"going on after {where}")
    return True


def _commit(state: RunState, store: RunStore, **changes: object) -> None:
    """Take a step as done, with these changes of the record, and save it."""
    state.change(**changes)
    store.save(state.checkpoint())


def _settle(
    state: RunState, store: RunStore, status: RunStatus, message: str | None = None
) -> None:
    """End; where it diverged, with the network of the epoch before, which is saved."""
    diverged = status == RunStatus.DIVERGED
    store.leave_last(state.record, None if diverged else state.network.state_dict())
    state.change(status=status, message=message)
    store.settle(state.record)


def _prune(state: RunState, store: RunStore, cache: Cache) -> None:
    """Prune the best network, or go on after the last stage that is saved.

    A stage may move the network's weights and running statistics too, in place: while it is pruned,
    the checkpoint holds it as the stage before left it.

    Raises:
        DivergedError: a loss of the pruned network is not finite.
    """
    if not state.record.is_pruning:
        if not state.record.ends_best:
            state.network.load_state_dict(store.read_best())
        _commit(state, store, before_pruning=state.record.best)
    if len(state.record.stages) != state.config.stages_in_all:
        _prune_stages(state, store, cache)
    assert state.mask is not None
    state.averages = {}
    state.mask.apply_(state.network)
    state.restart_optimizer()
    state.choose_training()  # which evaluates, too
    pruned = EpochRecord(state.epoch, state.evaluate())
    removed = state.mask.removed
    _commit(state, store, after_pruning=pruned, best=pruned, last=pruned, removed=removed)
    state.progress.note(f"pruned: {in_words(pruned.scores)}")
    check_finite(pruned.scores, "after pruning")


def _prune_stages(state: RunState, store: RunStore, cache: Cache) -> None:
    config, completed = state.config, len(state.record.stages)
    examples = StageExamples(state.dataset, config.examples, config.seed)
    examples.stage = completed + 1
    _note_limits(state, examples)

    def recall(stage: int, measure: Callable[[], Statistics]) -> Statistics:
        """Share the first stage's: from the second one on each run has its own mask."""
        return measure() if stage > 1 else cache.get("statistics", _measured(state), measure)

    pruning = pruning_of(config, state.network, examples, state.start_mask)
    before = state.record.stages[-1].get("compensation") if completed else None
    stages = Stages(
        pruning,
        state.mask and part_of(state.mask, pruning.network.weights),
        completed,
        recall,
        state.progress,
        damping=before and before["damping"],
        in_place=True,
        done=[stage_of(stage) for stage in state.record.stages],
        averages=state.averages,
    )
    state.progress.advance("stage", completed, config.stages_in_all)
    for mask, stage in stages:
        state.mask = joined(mask, state.start_mask)
        state.averages = stages.averages
        done = stage_dict(stage)
        state.change(stages=(*state.record.stages, done), removed=state.mask.removed)
        if store.due:
            store.save(state.checkpoint())
        state.progress.advance("stage", stage.stage, config.stages_in_all, stage_in_words(done))
        examples.stage += 1
    state.progress.close("stage")
    if state.mask is None:  # so little is to be removed that no stage was needed
        state.mask = part_of(Mask({}), pruning.network.weights)


def _note_limits(state: RunState, examples: StageExamples) -> None:
    """Tell of flags that ask for more than there is."""
    config = state.config
    if examples.examples < config.examples:
        state.progress.note(
            f"--nex {config.examples}: all {examples.examples} training examples are measured, as "
            "there are no more"
        )
    if config.recalibrate != "no" and not tracking_norms(state.network):
        state.progress.note(
            f"--recalibrate {config.recalibrate}: {config.arch} has no running statistics of batch "
            "normalisation, so there is nothing to estimate"
        )


def _measured(state: RunState) -> tuple[object, ...]:
    """What determines the statistics of a first stage."""
    criterion = criterion_of(state.config)
    return (
        weights_sha256(state.network.state_dict()),
        None if state.start_mask is None else weights_sha256(state.start_mask),
        (criterion.gradient, criterion.curvature, state.config.examples),
        state.config.reg == AUTO,  # then some of the examples are kept apart
        (state.config.estimator, state.config.parameters, state.config.exclude),
        *state.conditions(),
    )
