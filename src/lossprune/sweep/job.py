"""What an engine is given and what it gives back: plain values that travel between processes."""

import json
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from lossprune.experiment.config import RunConfig
from lossprune.experiment.folder import RunFolder
from lossprune.experiment.record import RunRecord
from lossprune.json_text import parse_digested, with_digest

ERROR = "error.json"
"""In a run's folder: why its last attempt failed."""


class RunPhase(StrEnum):
    """Where a run of a sweep stands."""

    WAITING = "waiting"  # for its baseline, or for others to train with
    READY = "ready"  # to be done alone
    RUNNING = "running"
    TOGETHER = "together"  # ready or running as one of a group
    DUE = "due"  # its next epoch is to be trained in a group
    LEFT = "left"  # its group, to be pruned
    ALONE = "alone"  # as no group can train it
    BUSY = "busy"  # another process has it
    LOST = "lost"  # with its worker
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"
    BLOCKED = "blocked"  # its baseline has not finished

    @property
    def is_end(self) -> bool:
        """Whether nothing comes after it."""
        return self in (self.FINISHED, self.DIVERGED, self.FAILED, self.BLOCKED)


class LostError(Exception):
    """The worker of a job died; the message says how that is known."""


@dataclass(frozen=True)
class Job:
    """One run to do, or several to train together.

    Attributes:
        configs: the runs.
        patience: seconds to wait for folders that other processes hold.
        tensorboard: folder for TensorBoard files, or None.
        leaves: whether one run is left when an epoch is due that a group would train better.
        imports: a folder that modules of the user's own are looked for in, or None; a node of a
            cluster has a working folder of its own.
    """

    configs: tuple[RunConfig, ...]
    patience: float = 0.0
    tensorboard: Path | None = None
    leaves: bool = False
    imports: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a run: a few numbers, not its record, so that a driver stays small.

    Attributes:
        status: where it stands for it.
        message: one sentence, where it is not finished.
        seconds: of computing.
        pruned_loss: training loss right after pruning, or None.
        valid_error: of the best network, or None.
        again: whether the reason was outside the run, so that the same command tries it again.
        full: whether there was no space left.
        busy: seconds that a worker spent on it, this time.
        gpus: that its worker sees, where it is due; 0 where it is done on the CPU.
    """

    status: RunPhase
    message: str | None = None
    seconds: float = 0.0
    pruned_loss: float | None = None
    valid_error: float | None = None
    again: bool = False
    full: bool = False
    busy: float = 0.0
    gpus: int = 0

    @classmethod
    def of(cls, record: RunRecord) -> "Outcome":
        """Return the outcome of a run that came to its end."""
        pruned, best = record.after_pruning, record.best
        return cls(
            RunPhase(record.status),
            record.message,
            record.seconds,
            None if pruned is None else pruned.scores.train_loss,
            None if best is None else best.scores.valid_error,
        )


def settled_outcome(folder: RunFolder) -> Outcome | None:
    """Return what came of a run that is at its end, or None; a damaged record is a failure."""
    try:
        record = folder.settled()
        return None if record is None else Outcome.of(record)
    except ValueError as error:  # which is no other run's affair
        return Outcome(RunPhase.FAILED, str(error))


def note_failure(folder: RunFolder, outcome: Outcome, details: str = "") -> None:
    """Leave word of a failure in the run's folder; where that cannot be written, none is left."""
    said = {**asdict(outcome), "details": details, "when": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write(ERROR, (json.dumps(with_digest(said), indent=1) + "\n").encode())
    except (OSError, ValueError):
        pass


def noted_failure(folder: RunFolder) -> Outcome | None:
    """Return the failure of the last attempt, or None."""
    try:
        said = parse_digested(folder.read(ERROR))
        said["status"] = RunPhase(said["status"])
        known = said.keys() & Outcome.__dataclass_fields__.keys()
        return Outcome(**{name: said[name] for name in known})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_lines(folder: RunFolder, count: int = 3) -> list[str]:
    """Return the last lines of the run's log."""
    try:
        return (folder.path / "log.txt").read_text(encoding="utf-8").splitlines()[-count:]
    except (OSError, ValueError):
        return []
