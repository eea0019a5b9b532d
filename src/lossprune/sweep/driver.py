"""Doing a plan's runs: baselines first, then what starts from them, whatever happens to some."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path

from lossprune.experiment.folder import RunFolder
from lossprune.experiment.record import FINISHED
from lossprune.sweep.board import BLOCKED, Board, label_runs
from lossprune.sweep.engines import Engine
from lossprune.sweep.job import (
    BUSY,
    FAILED,
    LOST,
    Job,
    Outcome,
    note_failure,
    noted_failure,
)
from lossprune.sweep.plan import PlannedRun
from lossprune.sweep.view import View

_ATTEMPTS = 5  # of a run whose workers die: more often than chance, so the run is the reason
_POLL_SECONDS = 0.5
_BUSY_SECONDS = 2.0


class Driver:
    """A sweep under way.

    What is done stands in the runs' folders and nowhere else: a driver that begins looks there, so
    it does not matter how an earlier one ended, or whether another is at work.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        engine: Engine,
        view: View,
        *,
        retry: bool = False,
        tensorboard: Path | None = None,
    ) -> None:
        self.runs = runs
        self.engine = engine
        self.view = view
        self.retry = retry
        self.tensorboard = tensorboard
        self.labels = label_runs(runs)
        self.board = Board(len(runs))
        self.stopped: str | None = None
        self._ready: deque[PlannedRun] = deque()
        self._waiting: dict[Path, list[PlannedRun]] = {}
        self._flying: dict[Future[Outcome], PlannedRun] = {}
        self._attempts: dict[PlannedRun, int] = {}
        self._not_before: dict[PlannedRun, float] = {}

    def finish(self) -> Board:
        """Do all that can be done, and return where it stands then."""
        self._look()
        self.view.begin(self.board)
        while self._ready or self._flying:
            self._submit()
            if not self._flying:
                if self.stopped:
                    break
                # No node is there yet, or others hold all that is left.
                time.sleep(_POLL_SECONDS / 5)
            done, _ = wait(self._flying, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                run = self._flying.pop(future)
                self.board.running.pop(self.labels[run], None)
                self._collect(run, self.engine.collect(future))
            self.view.tick(self.board)
        return self.board

    @property
    def running(self) -> dict[str, Path]:
        """The folders of the runs that are being done, by label."""
        return {self.labels[run]: run.config.folder for run in self._flying.values()}

    def _look(self) -> None:
        """Find what is done already, what has failed, and what can begin."""
        ended: dict[Path, Outcome] = {}
        for run in _longest_first(self.runs):
            outcome = self._found(run)
            folder = run.config.folder
            if outcome is not None:
                ended[folder] = outcome
                self._settle(run, outcome, found=True)
            elif run.baseline is None or run.baseline.folder in ended:
                self._begin_or_block(run, ended[run.baseline.folder] if run.baseline else None)
            else:
                self._waiting.setdefault(run.baseline.folder, []).append(run)

    def _found(self, run: PlannedRun) -> Outcome | None:
        folder = RunFolder(run.config.folder)
        record = folder.settled()
        if record is not None:
            return Outcome.of(record)
        failure = noted_failure(folder)
        if failure is not None and not failure.again and not self.retry:
            return replace(
                failure, message=f"{failure.message} (failed before; --retry tries again)"
            )
        return None

    def _begin_or_block(self, run: PlannedRun, baseline: Outcome | None) -> None:
        if baseline is None or baseline.status == FINISHED:
            self._ready.append(run)
        else:
            self._settle(run, Outcome(BLOCKED, f"its baseline {baseline.status}"))

    def _submit(self) -> None:
        self.board.capacity = self.engine.capacity()
        for run in self._startable():
            if len(self._flying) >= self.board.capacity or self.stopped:
                return
            self._ready.remove(run)
            config = run.config
            if config.threads is None:
                config = replace(config, threads=self.engine.threads)
            job = Job(config, self.engine.patience, self.tensorboard)
            self._flying[self.engine.submit(job)] = run
            self.board.running[self.labels[run]] = time.monotonic()

    def _startable(self) -> Iterator[PlannedRun]:
        """Runs whose time has come, in order; those that are held elsewhere wait a while."""
        now = time.monotonic()
        for run in list(self._ready):
            if self._not_before.get(run, 0.0) <= now:
                yield run

    def _collect(self, run: PlannedRun, outcome: Outcome) -> None:
        if outcome.status == BUSY:
            self._not_before[run] = time.monotonic() + _BUSY_SECONDS
            self._ready.append(run)
            return
        if outcome.status == LOST:
            attempts = self._attempts[run] = self._attempts.get(run, 0) + 1
            if attempts < _ATTEMPTS:
                self.view.note(f"{self.labels[run]}: {outcome.message}; it goes on elsewhere")
                self._ready.appendleft(run)
                return
            outcome = replace(
                outcome, status=FAILED, message=f"{outcome.message}, {attempts} times in a row"
            )
            note_failure(RunFolder(run.config.folder), outcome)
        if outcome.full:
            self.stopped = outcome.message
        self._settle(run, outcome)
        for dependent in self._waiting.pop(run.config.folder, []):
            self._begin_or_block(dependent, outcome)

    def _settle(self, run: PlannedRun, outcome: Outcome, *, found: bool = False) -> None:
        self._not_before.pop(run, None)
        self.board.settle(self.labels[run], outcome, found=found)
        if not found or outcome.status != FINISHED:
            self.view.ended(self.labels[run], outcome, RunFolder(run.config.folder), self.board)


def _longest_first(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Order the runs of one baseline so that no long one is left alone at the end.

    Baselines stay first, and their runs together: those share data and a start network.
    """
    order = {run.config.folder: place for place, run in enumerate(runs)}

    def key(run: PlannedRun) -> tuple[bool, int, int, int]:
        start = order[run.config.folder] if run.baseline is None else order[run.baseline.folder]
        return run.baseline is not None, start, -run.config.epochs, -run.config.stages

    return sorted(runs, key=key)
