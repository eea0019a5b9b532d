"""Where a sweep stands: what is running, done, failed and still to do, and the best so far."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossprune.experiment.config import RunConfig
from lossprune.sweep.job import Outcome, RunPhase
from lossprune.sweep.plan import FLAGS, PlannedRun


def label_runs(runs: Sequence[PlannedRun]) -> dict[PlannedRun, str]:
    """Name each run by the flags in which the runs of a plan differ."""
    labels = {run: "baseline " * (not run.config.prunes) for run in runs}
    for prunes in (False, True):
        group = [run for run in runs if run.config.prunes == prunes]
        named = {"pm": None} | {name: None for run in group for name in run.config.settings}
        settings = {run: _settings(run.config, named) for run in group}
        varying = [
            name for name in named if len({values[name] for values in settings.values()}) > 1
        ]
        varying = sorted(varying or ["pm", "seed"], key=lambda name: (name == "seed", name))
        for run in group:
            labels[run] += " ".join(f"{name}={settings[run][name]}" for name in varying)
    return labels


def _settings(config: RunConfig, names: Iterable[str]) -> dict[str, Any]:
    """Those settings of a run, by flag; one that it does not tell is the default."""
    told = config.settings
    return {name: told.get(name, FLAGS[name].default) for name in names}


@dataclass(frozen=True)
class RunningJob:
    """A job under way: a run, or several together, and the folder of the first of them."""

    folder: Path
    runs: int = 1
    since: float = field(default_factory=time.monotonic)


@dataclass
class Board:
    """Counts and a few numbers; what it holds does not grow with what the runs compute.

    Attributes:
        phases: where each run of the plan stands, in its order.
        found: runs that had been done before.
        capacity: jobs that can go at a time.
        running: jobs under way, by label.
        best: label and outcome of the pruned network of lowest validation error.
        ended: runs that this command did.
    """

    phases: dict[PlannedRun, RunPhase]
    found: int = 0
    capacity: int = 0
    running: dict[str, RunningJob] = field(default_factory=dict)
    best: tuple[str, Outcome] | None = None
    began: float = field(default_factory=time.monotonic)
    ended: int = 0

    def settle(self, run: PlannedRun, label: str, outcome: Outcome, *, found: bool = False) -> None:
        """Note the end of a run."""
        self.phases[run] = outcome.status
        self.found += found
        self.ended += not found and outcome.status != RunPhase.BLOCKED
        if outcome.pruned_loss is None or outcome.valid_error is None:
            return
        if self.best is None or outcome.valid_error < (self.best[1].valid_error or 0.0):
            self.best = (label, outcome)

    def count(self, phase: RunPhase) -> int:
        """Return how many runs stand there."""
        return sum(each is phase for each in self.phases.values())

    @property
    def total(self) -> int:
        """How many runs the plan has."""
        return len(self.phases)

    @property
    def left(self) -> int:
        """How many runs have not come to an end."""
        return sum(not phase.is_end for phase in self.phases.values())

    @property
    def eta(self) -> float | None:
        """Seconds until all is done, if the others take as long as those done by this command."""
        if not self.ended:
            return None
        return (time.monotonic() - self.began) / self.ended * self.left

    def summary(self) -> str:
        """Return all of it in one line."""
        parts = [f"{self.count(RunPhase.FINISHED)} of {self.total} finished"]
        if self.found:
            parts[0] += f" ({self.found} before)"
        if self.running:
            parts.append(f"{sum(job.runs for job in self.running.values())} running")
        for status in (RunPhase.DIVERGED, RunPhase.FAILED, RunPhase.BLOCKED):
            if self.count(status):
                parts.append(f"{self.count(status)} {status}")
        if self.left and self.eta is not None:
            parts.append(f"{duration(self.eta)} left")
        return ", ".join(parts)

    def told_best(self) -> str:
        """Return which pruned network is best, and by what, in a line; there must be one."""
        assert self.best is not None
        label, outcome = self.best
        return (
            f"lowest validation error: {outcome.valid_error:.2%} by {label}, "
            f"training loss {outcome.pruned_loss:.4f} right after pruning"
        )


def describe_outcome(outcome: Outcome) -> str:
    """Return what came of a run, in a few words."""
    if outcome.status != RunPhase.FINISHED:
        return f"{outcome.status}: {outcome.message}"
    words = [f"{outcome.seconds:.1f} s"]
    if outcome.pruned_loss is not None:
        words.append(f"training loss {outcome.pruned_loss:.4f} after pruning")
    if outcome.valid_error is not None:
        words.append(f"validation error {outcome.valid_error:.2%} at best")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """Return a time as a person says it.

    >>> duration(75), duration(7300)
    ('1 min 15 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
