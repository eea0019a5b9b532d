"""One run: train or load, prune, fine-tune, record; killed at any moment, it goes on."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lossprune.experiment.cache import Cache
from lossprune.experiment.config import RunConfig
from lossprune.experiment.keeping import Keeping
from lossprune.experiment.log import describe
from lossprune.experiment.prepare import Setting, computing, prepare
from lossprune.experiment.progress import Progress, Silent
from lossprune.experiment.pruning_step import prune
from lossprune.experiment.ranks import Ranks, current
from lossprune.experiment.record import EpochRecord, RunRecord, RunStatus, Scores
from lossprune.experiment.shared_folder import SharedFolder
from lossprune.experiment.state import RunState, check_finite
from lossprune.training import DivergedError


def run(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    cache: Cache | None = None,
    checkpoint_seconds: float = 0.0,
    leave: Callable[["Run"], bool] = lambda _: False,
) -> RunRecord:
    """Do the run that ``config`` describes, or what is left of it, and return its record.

    Everything is in ``config.folder`` when it returns; a run found finished is not touched.
    ``cache`` is what runs in one process share: data, start network, its evaluation and its first
    stage's statistics.  Between two checkpoints ``checkpoint_seconds`` go by or more; 0 keeps every
    stage and epoch.  Neither changes the result.  ``leave`` is asked when the first
    epoch is due: where it says so, the run is left there, saved, and its record says that it is
    still running.

    The processes of an initialised ``torch.distributed`` group do one run together: all call this
    with the same configuration and get the same record; the first one alone writes.

    Raises:
        ValueError, FileNotFoundError: as :func:`lossprune.experiment.prepare.prepare`; another
            process has the folder; it cannot be written; it belongs to another ``--model_0``.
    """
    folder = SharedFolder(config.folder, current())
    record = folder.settled()
    if record is not None:
        return record
    with (
        computing(config, folder.record()),
        opened(config, progress, cache=cache, checkpoint_seconds=checkpoint_seconds) as going,
    ):
        going.begin()
        if going.due and leave(going):
            return going.record
        while going.due:
            going.train()
        return going.record


@contextmanager
def opened(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    cache: Cache | None = None,
    checkpoint_seconds: float = 0.0,
) -> Iterator["Run"]:
    """Prepare a run and hold its folder; arguments and errors as :func:`run`."""
    ranks = current()
    folder = SharedFolder(config.folder, ranks)
    unfinished = folder.record()
    with ranks.together():
        setting = prepare(config, unfinished, cache)
    _check_start(setting, ranks)
    with folder.locked():
        state = RunState(setting, ranks, progress or Silent())
        yield Run(state, folder, cache or Cache(), checkpoint_seconds)


def _check_start(setting: Setting, ranks: Ranks) -> None:
    """Raise ValueError unless all processes begin from the same weights."""
    here = setting.start.weights_sha256.encode()
    first = ranks.from_first(lambda: here)
    with ranks.together():
        if here != first:
            raise ValueError(
                "the start network of this process is not that of the first one: "
                "--model_0 and torch must be the same on every machine"
            )


class Run:
    """A run under way, one epoch at a time.

    After :meth:`begin` it is pruned as far as it may be, and epochs are :attr:`due` until it has
    come to its end.  Each is either trained here (:meth:`train`) or elsewhere, together with other
    runs, and its scores taken (:meth:`take`); then :meth:`save` makes safe what was done, and
    :meth:`rest` is for a run that :attr:`stops`.

    Attributes:
        state: the run in memory.
    """

    def __init__(
        self, state: RunState, folder: SharedFolder, cache: Cache, checkpoint_seconds: float
    ) -> None:
        self.state = state
        self._folder = folder
        self._keeping = Keeping(state, folder, checkpoint_seconds)
        self._cache = cache

    def begin(self) -> None:
        """Start, or go on from the checkpoint, up to the next epoch to train."""
        # Another process may have finished it while this one was loading the data.
        settled = self._folder.settled()
        if settled is not None:
            self.state.take_record(settled)
            return
        with self._settling():
            if not self._keeping.restore():
                self._start()
            self._go_on()

    @property
    def record(self) -> RunRecord:
        """What is known of the run."""
        return self.state.record

    @property
    def due(self) -> bool:
        """Whether an epoch is to be trained; False where the run has come to its end."""
        return self.state.status == RunStatus.RUNNING

    @property
    def stops(self) -> bool:
        """Whether all epochs are done, or those before pruning: then none is to be trained now."""
        return self.state.epoch >= self.state.config.epochs or self.state.prunes_now

    @property
    def is_saved(self) -> bool:
        """Whether the checkpoint is of the last epoch."""
        return self._keeping.is_saved

    def train(self) -> None:
        """Train the epoch that is due, alone, and save it where it is time to."""
        state, keeping = self.state, self._keeping
        began = time.perf_counter()
        with self._settling():
            if state.record.training or state.ranks.world > 1:
                state.note_training(state.training.mode, state.training.reason)
            try:
                best = self._train_epoch(began)
            except DivergedError:
                if self.is_saved:
                    raise
                # It leaves the network of the epoch before, and nobody has that any more: there
                # once more from the checkpoint, now with one after every epoch.
                keeping.seconds = 0.0
                keeping.restore()
                return
            if self.stops or keeping.due:
                keeping.save(derived=self.stops or keeping.derives_now)
            elif best:
                keeping.keep_best()
            self._go_on()

    def _train_epoch(self, began: float) -> bool:
        """Train the epoch that is due, and return whether it is the best so far."""
        state = self.state
        try:
            state.training.train_epoch(
                state.optimizer, batch_size=state.config.batch_size, generator=state.generator
            )
        except DivergedError as error:
            raise self._diverged(error) from None
        scores = state.evaluate()
        best = state.add_epoch(scores, time.perf_counter() - began, own=True)
        state.progress.advance("epoch", state.epoch, state.config.epochs, describe(scores))
        return best

    def take(self, came: Scores | DivergedError, seconds: float, mode: str, reason: str) -> bool:
        """Take the epoch that was due, trained elsewhere; nothing is saved.

        Args:
            came: of what was trained, from the network and optimizer of this run.
            seconds: this run's share of what it took.
            mode: how it was trained.
            reason: why so.

        Returns:
            Whether it is the best so far: then :meth:`keep_best` is to be called.

        Raises:
            DivergedError: a loss is not finite.  The run is to :meth:`give_up` where it
                :attr:`is_saved`, else to :meth:`go_back` and come here again.
        """
        self.state.restart_clock()
        self.state.note_training(mode, reason)
        if isinstance(came, DivergedError):
            raise self._diverged(came)
        return self.state.add_epoch(came, seconds, own=False)

    def keep_best(self) -> None:
        """Keep a copy of the network, which is the best so far, until it is saved."""
        self._keeping.keep_best()

    def save(self) -> None:
        """Write what is not yet saved."""
        self._keeping.save()

    def rest(self) -> None:
        """Save a run that stops, and settle it where all epochs are done."""
        self.state.restart_clock()
        self.save()
        if self.state.epoch >= self.state.config.epochs:
            self._keeping.settle(RunStatus.FINISHED)

    def give_up(self, error: DivergedError) -> None:
        """Settle a run that is saved and whose next epoch diverged."""
        self.state.restart_clock()
        self._keeping.settle(RunStatus.DIVERGED, str(error))

    def go_back(self) -> None:
        """Go back to the checkpoint."""
        self._keeping.restore()

    @contextmanager
    def _settling(self) -> Iterator[None]:
        """Take a loss that is not finite as the end of this run."""
        try:
            yield
        except DivergedError as error:
            self._keeping.settle(RunStatus.DIVERGED, str(error))

    def _start(self) -> None:
        state = self.state
        computed = state.config.amp, state.config.compiled
        key = (state.record.start.weights_sha256, computed, *state.conditions())
        scores = self._cache.get("scores", key, state.evaluate)
        state.progress.note(f"start: {describe(scores)}")
        now = EpochRecord(0, scores)
        self._keeping.commit(best=now, last=now)
        check_finite(scores, "of the start network")

    def _go_on(self) -> None:
        """Prune where that is due; where nothing is, settle."""
        if self.state.prunes_now:
            prune(self.state, self._keeping, self._cache)
        if self.state.epoch >= self.state.config.epochs:
            self._keeping.settle(RunStatus.FINISHED)

    def _diverged(self, error: DivergedError) -> DivergedError:
        return DivergedError(f"epoch {self.state.epoch + 1}: {error}")
