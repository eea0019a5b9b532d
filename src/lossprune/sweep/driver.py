"""Doing a plan's runs: baselines first, then what starts from them, whatever happens to some."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from itertools import chain
from pathlib import Path

from lossprune.experiment.folder import RunFolder
from lossprune.sweep.board import Board, Flying, label_runs
from lossprune.sweep.engines import Engine, Outcomes
from lossprune.sweep.gathering import Gathering, Kind, kind_of
from lossprune.sweep.job import (
    Job,
    LostError,
    Outcome,
    RunPhase,
    note_failure,
    noted_failure,
)
from lossprune.sweep.plan import PlannedRun
from lossprune.sweep.view import View

_ATTEMPTS = 5  # of a run whose workers die: more often than chance, so the run is the reason
_POLL_SECONDS = 0.5
_BUSY_SECONDS = 2.0
_NAMED = 3  # runs of a group that a line names


class Driver:
    """A sweep under way.

    A run is a job of its own until its first epoch is due.  Then those that train better together
    wait until no other can join them, and are one job from there on.

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
        stack: int | None = None,
    ) -> None:
        self.runs = runs
        self.engine = engine
        self.view = view
        self.retry = retry
        self.tensorboard = tensorboard
        self.labels = label_runs(runs)
        self.board = Board(len(runs))
        self.stopped: str | None = None
        self._ready: deque[tuple[PlannedRun, ...]] = deque()
        self._waiting: dict[Path, list[PlannedRun]] = {}
        self._flying: dict[Future[Outcomes], tuple[PlannedRun, ...]] = {}
        self._stack = stack
        self._gathering = Gathering({run: place for place, run in enumerate(runs)}, stack)
        self._alone: set[PlannedRun] = set()  # that no group takes
        self._attempts: dict[PlannedRun, int] = {}
        self._not_before: dict[PlannedRun, float] = {}

    def finish(self) -> Board:
        """Do all that can be done, and return where it stands then."""
        self._look()
        self.view.begin(self.board)
        while self._ready or self._flying or self._gathering:
            self._gather()
            self._submit()
            if not self._flying:
                if self.stopped:
                    break
                # No node is there yet, or others hold all that is left.
                time.sleep(_POLL_SECONDS / 5)
            done, _ = wait(self._flying, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                self._collect(self._flying.pop(future), future)
            self.view.tick(self.board)
        return self.board

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
        try:
            record = folder.settled()
            if record is not None:
                return Outcome.of(record)
        except ValueError as error:  # its record is damaged, which is no other run's affair
            return Outcome(RunPhase.FAILED, str(error))
        failure = noted_failure(folder)
        if failure is not None and not failure.again and not self.retry:
            return replace(
                failure, message=f"{failure.message} (failed before; --retry tries again)"
            )
        return None

    def _begin_or_block(self, run: PlannedRun, baseline: Outcome | None) -> None:
        if baseline is None or baseline.status == RunPhase.FINISHED:
            self._ready.append((run,))
        else:
            self._settle(run, Outcome(RunPhase.BLOCKED, f"its baseline {baseline.status}"))

    def _gather(self) -> None:
        """Form groups of the runs that nobody else can join."""
        for kind in self._gathering.kinds:
            if self._comes(kind):
                continue
            places = self.engine.places(self._gathering.gpus.get(kind, 0))
            for group in self._gathering.take(kind, places):
                self._ready.appendleft(group)
                if len(group) == 1:
                    self._alone.update(group)

    def _comes(self, kind: Kind) -> bool:
        """Whether a run of this kind may soon be due; one that is held elsewhere may not."""
        jobs = chain(self._ready, self._flying.values())
        runs = chain((job[0] for job in jobs if len(job) == 1), *self._waiting.values())
        return any(
            kind_of(run.config) == kind and run not in self._not_before and self._may_leave(run)
            for run in runs
        )

    def _may_leave(self, run: PlannedRun) -> bool:
        """Whether a run may join a group when it is due."""
        return self._stack != 1 and run.config.epochs > 0 and run not in self._alone

    def _submit(self) -> None:
        self.board.capacity = self.engine.capacity()
        for runs in self._startable():
            if len(self._flying) >= self.board.capacity or self.stopped:
                return
            self._ready.remove(runs)
            configs = tuple(
                replace(run.config, threads=run.config.threads or self.engine.threads)
                for run in runs
            )
            leaves = len(runs) == 1 and self._may_leave(runs[0])
            job = Job(configs, self.engine.patience, self.tensorboard, leaves)
            self._flying[self.engine.submit(job)] = runs
            self.board.running[self._label(runs)] = Flying(runs[0].config.folder, len(runs))
            if len(runs) > 1:
                self.view.note(f"training together: {self._label(runs)}")

    def _label(self, runs: Sequence[PlannedRun]) -> str:
        """Return the labels of a job's runs, or of many the first ones and how many they are."""
        labels = [self.labels[run] for run in runs]
        if len(labels) <= _NAMED:
            return "; ".join(labels)
        return f"{len(labels)} runs: {'; '.join(labels[:_NAMED])}; …"

    def _startable(self) -> Iterator[tuple[PlannedRun, ...]]:
        """Jobs whose time has come, in order; runs that are held elsewhere wait a while."""
        now = time.monotonic()
        for runs in list(self._ready):
            if all(self._not_before.get(run, 0.0) <= now for run in runs):
                yield runs

    def _collect(self, runs: tuple[PlannedRun, ...], future: Future[Outcomes]) -> None:
        label = self._label(runs)
        self.board.running.pop(label, None)
        try:
            outcomes = self.engine.collect(future)
        except LostError as error:
            outcomes = (Outcome(RunPhase.LOST, str(error), again=True),) * len(runs)
            if any(self._attempts.get(run, 0) + 1 < _ATTEMPTS for run in runs):
                it_goes = "they go" if len(runs) > 1 else "it goes"
                self.view.note(f"{label}: {error}; {it_goes} on elsewhere")
        for run, outcome in zip(runs, outcomes, strict=True):
            self._sort(run, outcome, grouped=len(runs) > 1)

    def _sort(self, run: PlannedRun, outcome: Outcome, *, grouped: bool) -> None:
        """Settle a run, or say what is next for it."""
        if outcome.status == RunPhase.BUSY:
            self._not_before[run] = time.monotonic() + _BUSY_SECONDS
            self._ready.append((run,))
            return
        self._not_before.pop(run, None)
        if outcome.status == RunPhase.DUE:
            self._gathering.add(run)
            self._gathering.gpus[kind_of(run.config)] = outcome.gpus
        elif outcome.status == RunPhase.LEFT:
            self._ready.append((run,))
        elif outcome.status == RunPhase.ALONE:
            self._alone.add(run)
            self._ready.append((run,))
        elif outcome.status == RunPhase.LOST:
            self._try_again(run, outcome, grouped=grouped)
        else:
            self._end(run, outcome)

    def _try_again(self, run: PlannedRun, outcome: Outcome, *, grouped: bool) -> None:
        """Go on with a run whose worker died, unless that comes again and again."""
        attempts = self._attempts[run] = self._attempts.get(run, 0) + 1
        if attempts < _ATTEMPTS and grouped:
            self._gathering.add(run)
        elif attempts < _ATTEMPTS:
            self._ready.appendleft((run,))
        elif grouped:  # one of them is the reason: alone, it will show which
            self._attempts[run] = 0
            self._alone.add(run)
            self._ready.append((run,))
        else:
            message = f"{outcome.message}, {attempts} times in a row"
            outcome = replace(outcome, status=RunPhase.FAILED, message=message)
            note_failure(RunFolder(run.config.folder), outcome)
            self._end(run, outcome)

    def _end(self, run: PlannedRun, outcome: Outcome) -> None:
        if outcome.full:
            self.stopped = outcome.message
        self._settle(run, outcome)
        for dependent in self._waiting.pop(run.config.folder, []):
            self._begin_or_block(dependent, outcome)

    def _settle(self, run: PlannedRun, outcome: Outcome, *, found: bool = False) -> None:
        self._not_before.pop(run, None)
        self.board.settle(self.labels[run], outcome, found=found)
        if not found or outcome.status != RunPhase.FINISHED:
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
