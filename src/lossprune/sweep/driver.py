"""Doing a plan's runs: baselines first, then what starts from them, whatever happens to some."""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from math import inf
from pathlib import Path

from lossprune.experiment.folder import RunFolder
from lossprune.sweep.board import Board, RunningJob, label_runs
from lossprune.sweep.engines import Engine, Outcomes
from lossprune.sweep.grouping import Kind, kind_of, split_evenly
from lossprune.sweep.job import (
    Job,
    LostError,
    Outcome,
    RunPhase,
    note_failure,
    noted_failure,
    settled_outcome,
)
from lossprune.sweep.plan import PlannedRun
from lossprune.sweep.view import View

_ATTEMPTS = 5  # of a run whose workers die: more often than chance, so the run is the reason
_POLL_SECONDS = 0.5
_BUSY_SECONDS = 2.0
_NAMED = 3  # runs of a group that a line names
_MAY_BE_DUE = (RunPhase.WAITING, RunPhase.READY, RunPhase.RUNNING)


class Driver:
    """A sweep under way.

    A run is a job of its own until its first epoch is due.  Then those that train better together
    wait until no other can join them, and are one job from there on.

    What is done stands in the runs' folders and nowhere else: a driver that begins looks there, so
    it does not matter how an earlier one ended, or whether another is at work.

    Attributes:
        board: where each run stands.
        stopped: why no other job is begun, or None.
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
        self.board = Board(dict.fromkeys(runs, RunPhase.WAITING))
        self.stopped: str | None = None
        self._stack = stack
        self._dependents: dict[Path, list[PlannedRun]] = {}  # by the folder of their baseline
        for run in _longest_first(runs):
            if run.baseline is not None:
                self._dependents.setdefault(run.baseline.folder, []).append(run)
        self._queue: deque[tuple[PlannedRun, ...]] = deque()  # jobs to begin, in order
        self._jobs: dict[Future[Outcomes], tuple[PlannedRun, ...]] = {}  # under way
        self._alone: set[PlannedRun] = set()  # that no group takes
        self._attempts: Counter[PlannedRun] = Counter()
        self._not_before: dict[PlannedRun, float] = {}
        self._gpus: dict[Kind, int] = {}

    def finish(self) -> Board:
        """Do all that can be done, and return where it stands then."""
        self._look()
        self.view.begin(self.board)
        while self._queue or self._jobs or self.board.count(RunPhase.DUE):
            self._gather()
            self._submit()
            if not self._jobs:
                if self.stopped:
                    break
                # No node is there yet, or others hold all that is left.
                time.sleep(_POLL_SECONDS / 5)
            done, _ = wait(self._jobs, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                self._collect(self._jobs.pop(future), future)
            self.view.tick(self.board)
        return self.board

    def _look(self) -> None:
        """Find what is done already, what has failed, and what can begin."""
        ended: dict[Path, Outcome] = {}
        for run in _longest_first(self.runs):
            outcome = self._found(run)
            if outcome is not None:
                ended[run.config.folder] = outcome
                self._settle(run, outcome, found=True)
            elif run.baseline is None:
                self._enqueue(run)
            elif run.baseline.folder in ended:
                self._begin_or_block(run, ended[run.baseline.folder])

    def _found(self, run: PlannedRun) -> Outcome | None:
        folder = RunFolder(run.config.folder)
        if (settled := settled_outcome(folder)) is not None:
            return settled
        failure = noted_failure(folder)
        if failure is not None and not failure.again and not self.retry:
            return replace(
                failure, message=f"{failure.message} (failed before; --retry tries again)"
            )
        return None

    def _begin_or_block(self, run: PlannedRun, baseline: Outcome) -> None:
        if baseline.status == RunPhase.FINISHED:
            self._enqueue(run)
        else:
            self._settle(run, Outcome(RunPhase.BLOCKED, f"its baseline {baseline.status}"))

    def _enqueue(
        self, run: PlannedRun, phase: RunPhase = RunPhase.READY, *, first: bool = False
    ) -> None:
        """Let a run be a job of its own: the next one, or the last."""
        self.board.phases[run] = phase
        if first:
            self._queue.appendleft((run,))
        else:
            self._queue.append((run,))

    def _gather(self) -> None:
        """Form groups of the runs that nobody else can join."""
        due: dict[Kind, list[PlannedRun]] = {}
        for run, phase in self.board.phases.items():
            if phase is RunPhase.DUE:
                due.setdefault(kind_of(run.config), []).append(run)
        for kind, runs in due.items():
            if self._comes(kind):
                continue
            places = self.engine.places(self._gpus.get(kind, 0))
            for group in split_evenly(runs, places, self._stack):
                self._queue.appendleft(group)
                self.board.phases.update(dict.fromkeys(group, RunPhase.TOGETHER))
                if len(group) == 1:
                    self._alone.update(group)

    def _comes(self, kind: Kind) -> bool:
        """Whether a run of this kind may soon be due; one that is held elsewhere may not."""
        return any(
            phase in _MAY_BE_DUE and kind_of(run.config) == kind and self._may_leave(run)
            for run, phase in self.board.phases.items()
        )

    def _may_leave(self, run: PlannedRun) -> bool:
        """Whether a run may join a group when it is due."""
        return self._stack != 1 and run.config.epochs > 0 and run not in self._alone

    def _submit(self) -> None:
        self.board.capacity = self.engine.capacity()
        for runs in self._startable():
            if len(self._jobs) >= self.board.capacity or self.stopped:
                return
            self._queue.remove(runs)
            configs = tuple(
                replace(run.config, threads=run.config.threads or self.engine.threads)
                for run in runs
            )
            alone = len(runs) == 1
            leaves = alone and self._may_leave(runs[0])
            job = Job(configs, self.engine.patience, self.tensorboard, leaves)
            self._jobs[self.engine.submit(job)] = runs
            if self.board.phases[runs[0]] is RunPhase.READY:  # else it is seen as it was before
                self.board.phases[runs[0]] = RunPhase.RUNNING
            self.board.running[self._label(runs)] = RunningJob(runs[0].config.folder, len(runs))
            if not alone:
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
        for runs in list(self._queue):
            if all(self._not_before.get(run, 0.0) <= now for run in runs):
                yield runs

    def _collect(self, runs: tuple[PlannedRun, ...], future: Future[Outcomes]) -> None:
        label = self._label(runs)
        self.board.running.pop(label, None)
        try:
            outcomes = self.engine.collect(future)
        except LostError as error:
            outcomes = (Outcome(RunPhase.LOST, str(error), again=True),) * len(runs)
            if any(self._attempts[run] + 1 < _ATTEMPTS for run in runs):
                it_goes = "they go" if len(runs) > 1 else "it goes"
                self.view.note(f"{label}: {error}; {it_goes} on elsewhere")
        for run, outcome in zip(runs, outcomes, strict=True):
            self._take(run, outcome, grouped=len(runs) > 1)

    def _take(self, run: PlannedRun, outcome: Outcome, *, grouped: bool) -> None:
        """Settle a run, or say what is next for it."""
        match outcome.status:
            case RunPhase.BUSY:
                self._not_before[run] = time.monotonic() + _BUSY_SECONDS
                self._enqueue(run, RunPhase.BUSY)
            case RunPhase.DUE:
                self.board.phases[run] = RunPhase.DUE
                self._gpus[kind_of(run.config)] = outcome.gpus
            case RunPhase.LEFT:
                self._enqueue(run)
            case RunPhase.ALONE:
                self._alone.add(run)
                self._enqueue(run)
            case RunPhase.LOST:
                self._try_again(run, outcome, grouped=grouped)
            case _:
                self._end(run, outcome)

    def _try_again(self, run: PlannedRun, outcome: Outcome, *, grouped: bool) -> None:
        """Go on with a run whose worker died, unless that comes again and again."""
        self._attempts[run] += 1
        if self._attempts[run] < _ATTEMPTS and grouped:
            self.board.phases[run] = RunPhase.DUE
        elif self._attempts[run] < _ATTEMPTS:
            self._enqueue(run, first=True)
        elif grouped:  # one of them is the reason: alone, it will show which
            self._attempts[run] = 0
            self._alone.add(run)
            self._enqueue(run)
        else:
            message = f"{outcome.message}, {self._attempts[run]} times in a row"
            outcome = replace(outcome, status=RunPhase.FAILED, message=message)
            note_failure(RunFolder(run.config.folder), outcome)
            self._end(run, outcome)

    def _end(self, run: PlannedRun, outcome: Outcome) -> None:
        if outcome.full:
            self.stopped = outcome.message
        self._settle(run, outcome)
        for dependent in self._dependents.get(run.config.folder, ()):
            if self.board.phases[dependent] is RunPhase.WAITING:
                self._begin_or_block(dependent, outcome)

    def _settle(self, run: PlannedRun, outcome: Outcome, *, found: bool = False) -> None:
        self.board.settle(run, self.labels[run], outcome, found=found)
        if not found or outcome.status != RunPhase.FINISHED:
            self.view.ended(self.labels[run], outcome, RunFolder(run.config.folder), self.board)


def _longest_first(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Order the runs of one baseline so that no long one is left alone at the end.

    Baselines stay first, and their runs together: those share data and a start network.
    """
    order = {run.config.folder: place for place, run in enumerate(runs)}

    def key(run: PlannedRun) -> tuple[bool, int, int, float]:
        start = order[run.config.folder] if run.baseline is None else order[run.baseline.folder]
        stages = run.config.stages_in_all or inf  # where it is not known, it may be many
        return run.baseline is not None, start, -run.config.epochs, -stages

    return sorted(runs, key=key)
