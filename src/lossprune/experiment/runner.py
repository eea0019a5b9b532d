"""A run alone, in this process or in several that share it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lossprune.experiment.config import RunConfig
from lossprune.experiment.environment import computing
from lossprune.experiment.folder import RunFolder
from lossprune.experiment.prepare import Cache, PreparedRun, prepare
from lossprune.experiment.ranks import Ranks, current
from lossprune.experiment.record import RunRecord
from lossprune.experiment.state import RunState
from lossprune.experiment.store import RunStore
from lossprune.experiment.story import Request, Trained, tell
from lossprune.progress import Progress, Silent
from lossprune.user_code import blaming_users_code


class OpenRun:
    """A run whose folder is held, one epoch at a time.

    Attributes:
        state, store: the run in memory, and in its folder.
        request: what it needs to go on; None: it has come to its end.
    """

    def __init__(self, state: RunState, store: RunStore, cache: Cache) -> None:
        self.state = state
        self.store = store
        self.request: Request | None = None
        self._story = tell(state, store, cache)

    @property
    def record(self) -> RunRecord:
        """What is known of the run."""
        return self.state.record

    @property
    def due(self) -> bool:
        """Whether an epoch is to be trained."""
        return self.request is Request.TRAIN

    def begin(self) -> None:
        """Start, or go on from the checkpoint, up to the next epoch to train."""
        self._go_on(None)

    def train(self) -> None:
        """Train the epoch that is due, alone, and go on up to the next."""
        self._go_on(self.state.train_epoch())

    def save(self) -> None:
        """Write what is not yet saved, between two epochs."""
        if self.store.saved_epoch != self.state.epoch:
            self.store.save(self.state.checkpoint())

    def _go_on(self, trained: Trained | None) -> None:
        self.answer(trained)
        while not (self.due or self.request is None):
            self.answer()  # alone, it has all that it can ask for

    def answer(self, trained: Trained | None = None) -> None:
        """Tell the run that it has what it asked for, and let it go on to its next request."""
        try:
            self.request = self._story.send(trained)
        except StopIteration:
            self.request = None


def run(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    cache: Cache | None = None,
    checkpoint_seconds: float = 0.0,
    leave: Callable[[OpenRun], bool] = lambda _: False,
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
    folder = RunFolder(config.folder, current())
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
) -> Iterator[OpenRun]:
    """Prepare a run and hold its folder; arguments and errors as :func:`run`."""
    ranks = current()
    folder = RunFolder(config.folder, ranks)
    unfinished = folder.record()
    with ranks.together(), blaming_users_code():
        prepared = prepare(config, unfinished, cache)
    _check_start(prepared, ranks)
    progress = progress or Silent()
    if prepared.note is not None:
        progress.note(prepared.note)
    with folder.locked():
        state = RunState(prepared, ranks, progress)
        store = RunStore(folder, prepared.about_networks, prepared.device, checkpoint_seconds)
        yield OpenRun(state, store, cache or Cache())


def _check_start(prepared: PreparedRun, ranks: Ranks) -> None:
    """Raise ValueError unless all processes begin from the same weights and data."""
    here = f"{prepared.start.weights_sha256} {prepared.own.get('data')}".encode()
    first = ranks.from_first(lambda: here)
    with ranks.together():
        if here != first:
            raise ValueError(
                "the start network of this process is not that of the first one: "
                "--model_0 and torch must be the same on every machine, and so must what functions "
                "of your own return"
            )
