"""One run of a group: whatever happens to it is its own affair."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import inf

from lossprune.experiment.config import RunConfig
from lossprune.experiment.folder import RunFolder, when_free
from lossprune.experiment.prepare import Cache
from lossprune.experiment.record import RunRecord
from lossprune.experiment.runner import OpenRun, opened
from lossprune.experiment.story import Request, Trained

Result = RunRecord | Exception


class GroupMember:
    """A run of a group, until it has a result."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.result: Result | None = None
        self._run: OpenRun | None = None
        self._exits = ExitStack()

    @property
    def run(self) -> OpenRun:
        """The run, while it is open."""
        assert self._run is not None
        return self._run

    @property
    def outcome(self) -> Result:
        """The result, when there is one."""
        assert self.result is not None
        return self.result

    @property
    def going(self) -> bool:
        """Whether it trains with the others."""
        return self.wants(Request.TRAIN)

    def wants(self, request: Request) -> bool:
        """Whether it is open, and needs this to go on."""
        return self.result is None and self._run is not None and self._run.request is request

    def open(self, cache: Cache, deadline: float) -> None:
        """Prepare the run and hold its folder, up to the epoch that is due."""
        with self._failing_alone():
            self.result = RunFolder(self.config.folder).settled()
            if self.result is None:
                run = partial(opened, self.config, cache=cache)
                self._run = when_free(lambda: self._exits.enter_context(run()), deadline)
                self._run.begin()
                self._run.store.seconds = inf  # the group says when
                self.result = None if self.going else self._run.record
        self.let_go()

    def take(self, trained: Trained, mode: str, reason: str) -> None:
        """Take an epoch that was trained in this way."""
        self.run.state.restart_clock()
        self.run.state.note_training(mode, reason)
        self.answer(trained)

    def answer(self, trained: Trained | None = None) -> None:
        """Let the run go on to its next request; pruned it is elsewhere, while others train."""
        with self._failing_alone():
            self.run.state.restart_clock()
            self.run.answer(trained)
            if self.run.request in (None, Request.PRUNING):
                self.result = self.run.record

    def save(self) -> None:
        """Write what is not yet saved."""
        with self._failing_alone():
            self.run.save()

    @contextmanager
    def _failing_alone(self) -> Iterator[None]:
        """Let a failure of this run end it and no other."""
        try:
            yield
        except Exception as error:
            self.result = error

    def end(self, result: Result) -> None:
        """Take the result where there is none, and let the folder go."""
        self.result = self.result or result
        self.close()

    def let_go(self) -> None:
        """Let the folder go where there is a result, in the thread that took it: the lock asks."""
        if self.result is not None:
            self.close()

    def close(self) -> None:
        """Let the folder go; what is saved stays."""
        self._run = None
        self._exits.close()
