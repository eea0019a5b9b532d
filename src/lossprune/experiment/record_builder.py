"""What grows with every epoch of a run, at a cost that does not."""

from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from lossprune.experiment.record import EpochRecord, RunRecord


class GrowingRecord:
    """A record that epochs are added to one by one, and that is put together when it is asked for.

    Attributes:
        epoch: how many epochs are done.
        status: as in the record.
        best: the best epoch so far: of lowest validation error, the first of them.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._rows: list[EpochRecord] = []
        self._seconds = 0.0
        self.epoch = len(record.epochs)
        self.status = record.status
        self.best = record.best
        self.is_pruned = record.after_pruning is not None

    def add(self, row: EpochRecord, spent: float) -> bool:
        """Add an epoch and the seconds it took of the run; return whether it is the new best."""
        self._rows.append(row)
        self._seconds += spent
        self.epoch += 1
        if self.best is not None and row.scores.valid_error >= self.best.scores.valid_error:
            return False
        self.best = row
        return True

    @property
    def whole(self) -> RunRecord:
        """The record as it stands."""
        if self._rows:
            self._record = replace(
                self._record,
                epochs=(*self._record.epochs, *self._rows),
                best=self.best,
                last=self._rows[-1],
                seconds=self._record.seconds + self._seconds,
            )
            self._rows, self._seconds = [], 0.0
        return self._record


class StepDecay:
    """After every ``every`` epochs, η ← η · ``factor``.

    The rates of ``torch.optim.lr_scheduler.StepLR``, to the bit, for less than a microsecond.
    """

    def __init__(self, optimizer: Optimizer, every: int, factor: float) -> None:
        self._optimizer, self._every, self._factor = optimizer, every, factor
        self._epochs = 0

    def step(self) -> None:
        """Take note of the end of an epoch."""
        self._epochs += 1
        if self._factor != 1 and self._epochs % self._every == 0:
            for group in self._optimizer.param_groups:
                group["lr"] *= self._factor

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes; the rate itself is the optimizer's."""
        return {"last_epoch": self._epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._epochs = state["last_epoch"]
