"""What grows with every epoch of a run, at a cost that does not."""

import time
from dataclasses import replace

from lossprune.experiment.record import EpochRecord, RunRecord, Scores


class RecordBuilder:
    """A record that epochs are added to one by one, and that is put together when it is asked for.

    It also counts the seconds that the run takes.

    Attributes:
        epoch: how many epochs are done.
        best: the best epoch so far: of lowest validation error, the first of them.
    """

    def __init__(self, record: RunRecord) -> None:
        self._clock = time.perf_counter()
        self._take(record)

    def _take(self, record: RunRecord) -> None:
        self._record = record
        self._rows: list[EpochRecord] = []
        self._seconds = 0.0
        self.epoch = len(record.epochs)
        self.best = record.best

    @property
    def record(self) -> RunRecord:
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

    def change(self, **changes: object) -> None:
        """Change fields of the record, and count the seconds since it last changed."""
        seconds = self.record.seconds + self._lap()
        self._take(replace(self.record, seconds=seconds, **changes))  # type: ignore[arg-type]

    def add_epoch(self, scores: Scores, seconds: float) -> bool:
        """Add an epoch that took so many seconds; return whether it is the best so far.

        Where it was trained here alone, what has gone by since the record last changed is the
        run's; else the clock was restarted, and the run has only taken its seconds.
        """
        row = EpochRecord(self.epoch + 1, scores, seconds)
        self._rows.append(row)
        self._seconds += max(seconds, self._lap())
        self.epoch += 1
        if self.best is not None and scores.valid_error >= self.best.scores.valid_error:
            return False
        self.best = row
        return True

    def restart_clock(self) -> None:
        """Count seconds from now on: others have computed meanwhile."""
        self._clock = time.perf_counter()

    def _lap(self) -> float:
        now = time.perf_counter()
        spent, self._clock = now - self._clock, now
        return spent
