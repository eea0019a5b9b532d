"""One run of a group: whatever happens to it is its own affair."""

import time
from collections.abc import Callable
from contextlib import ExitStack

from lossprune.experiment.cache import Cache
from lossprune.experiment.config import RunConfig
from lossprune.experiment.folder import FolderBusyError, RunFolder
from lossprune.experiment.record import RunRecord
from lossprune.experiment.runner import Run, opened
from lossprune.training import DivergedError

Result = RunRecord | Exception

_BUSY_SECONDS = 0.5


class Member:
    """A run of a group, until it has a result."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.result: Result | None = None
        self.diverged = False
        self._run: Run | None = None
        self._exits = ExitStack()

    @property
    def run(self) -> Run:
        """The run, while it is open."""
        assert self._run is not None
        return self._run

    @property
    def told(self) -> Result:
        """The result, when there is one."""
        assert self.result is not None
        return self.result

    @property
    def going(self) -> bool:
        """Whether it trains with the others."""
        return self._run is not None and not self.diverged

    def open(self, cache: Cache, deadline: float) -> None:
        """Prepare the run and hold its folder, up to the epoch that is due."""
        settled = RunFolder(self.config.folder).settled()
        if settled is not None:
            self.end(settled)
            return
        while True:
            try:
                self._run = self._exits.enter_context(opened(self.config, cache=cache))
                break
            except FolderBusyError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_BUSY_SECONDS)
        self._run.begin()
        if not self._run.due:
            self.end(self._run.record)

    def attempt(self, action: Callable[[], object]) -> None:
        """Do something of this run, whose failure ends it alone."""
        try:
            action()
        except Exception as error:
            self.end(error)

    def diverge(self, error: DivergedError) -> None:
        """End where the epoch before is saved, which is what a diverged run leaves."""
        if not self.run.is_saved:
            self.diverged = True
            return
        self.run.give_up(error)
        self.end(self.run.record)

    def end(self, result: Result) -> None:
        """Take the result, and let the folder go."""
        self.result = self.result or result
        self.close()

    def close(self) -> None:
        """Let the folder go; what is saved stays."""
        self._run, self.diverged = None, False
        self._exits.close()
