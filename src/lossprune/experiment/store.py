"""What a run has in its folder, so that a kill at any moment loses little and breaks nothing."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from lossprune.experiment.checkpoint import Checkpoint
from lossprune.experiment.folder import BEST, CHECKPOINT, LAST, LOG, MASK, RECORD
from lossprune.experiment.log import log_text
from lossprune.experiment.network_file import network_in
from lossprune.experiment.record import RunStatus
from lossprune.experiment.shared_folder import SharedFolder
from lossprune.experiment.state import RunState
from lossprune.pruning import Mask

T = TypeVar("T")

_DERIVING = 0.05  # of the time, at most, ...
_CHEAP_SECONDS = 0.02  # ... unless it takes less than this


class Keeping:
    """The files of one run.

    The checkpoint is what a run goes on from, and is written first.  Mask, best network, log and
    record can be made again from it; the last two grow with every epoch, so they are written less
    often where epochs are short.

    Args:
        state: the run.
        folder: its folder, held by this process.
        seconds: that go by between two checkpoints, or more; 0: one after every stage and epoch.
    """

    def __init__(self, state: RunState, folder: SharedFolder, seconds: float) -> None:
        self.seconds = seconds
        self._state = state
        self._folder = folder
        self._saved_epoch: int | None = None
        self._best: Mapping[str, Tensor] | None = None  # where its file does not hold it yet
        self._saved = self._derived = time.perf_counter()
        self._deriving = 0.0  # seconds that writing what is derived took, the last time

    @property
    def is_saved(self) -> bool:
        """Whether the checkpoint is of the last epoch."""
        return self._saved_epoch == self._state.epoch

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.perf_counter() - self._saved >= self.seconds

    @property
    def derives_now(self) -> bool:
        """Whether writing log and record again takes a small share of the time since the last."""
        since = time.perf_counter() - self._derived
        return self._deriving <= max(_CHEAP_SECONDS, _DERIVING * since)

    def commit(self, **changes: object) -> None:
        """Take a step as done, with these changes of the record, and save it."""
        self._state.change(**changes)
        self._saved_epoch = None
        self.save()

    def save(self, *, derived: bool = True) -> None:
        """Write what is not yet saved: the checkpoint, then what can be made again from it."""
        if self.is_saved:
            return
        state = self._state
        network, best = state.network.state_dict(), self._best
        if state.is_best and not state.is_pruning:
            self._best, best = network, None
        mask = state.mask if state.is_pruning or state.is_fresh else None
        checkpoint = Checkpoint(
            state.record,
            network,
            state.optimizer.state_dict(),
            state.schedule.state_dict(),
            dict(mask or {}),
            best or {},
        )
        self._folder.write(CHECKPOINT, checkpoint.to_bytes())
        self._saved_epoch = state.epoch
        self._saved = time.perf_counter()
        if derived:
            self._write_derived()
        elif self._best is network:
            self.keep_best()  # before it is trained further

    def keep_best(self) -> None:
        """Keep a copy of the network, which is the best so far, until it is saved."""
        state = self._state
        self._best = {name: it.clone() for name, it in state.network.state_dict().items()}

    def bring_best(self) -> None:
        """Give the run the weights of its best epoch."""
        state = self._state
        if not state.is_best:
            weights, _ = self._needed(BEST, network_in)
            state.network.load_state_dict(weights)

    def restore(self) -> bool:
        """Bring the run to where its checkpoint is; return whether there is one.

        Raises:
            ValueError: it, or what it needs beside it, is damaged; or it was begun from another
                start network.
        """
        if not self._folder.has(CHECKPOINT):
            return False
        state, saved = self._state, self._checkpoint()
        if saved.record.start.weights_sha256 != state.record.start.weights_sha256:
            raise ValueError(
                f"{self._folder.path} was begun from another start network "
                f"({saved.record.start.path}); give --path another folder"
            )
        state.take_record(saved.record)
        self._saved_epoch, self._best = state.epoch, None
        state.network.load_state_dict(dict(saved.network))
        criterion = state.config.criterion
        if saved.record.after_pruning is not None:
            if state.is_fresh:
                state.mask = Mask(dict(saved.mask), criterion=criterion)
            else:
                state.mask = self._needed(MASK, Mask.from_bytes)
            state.restart_optimizer()
            state.keep_training()
        elif saved.mask:
            state.mask = Mask(dict(saved.mask), criterion=criterion)
        state.optimizer.load_state_dict(dict(saved.optimizer))
        state.schedule.load_state_dict(dict(saved.schedule))
        if saved.best:
            self._best = saved.best
        elif state.is_best and not state.is_pruning:
            self._best = saved.network
        elif not state.is_pruning:  # then the best will be one of those that are pruned
            self._needed(BEST, network_in)
        self._write_derived()
        where = f"epoch {state.epoch}"
        if state.is_pruning:
            where = f"pruning stage {len(state.record.stages)}"
        state.progress.note(f"going on after {where}")
        return True

    def settle(self, status: RunStatus, message: str | None = None) -> None:
        """Write what a run leaves, the record last; what only an unfinished one needs goes.

        The last network is that of the checkpoint: where it diverged, of the epoch before.
        """
        state = self._state
        last = (
            self._checkpoint().network
            if status == RunStatus.DIVERGED
            else state.network.state_dict()
        )
        self._folder.write(LAST, state.network_bytes(last, state.record.last))
        state.change(status=status, message=message)
        self._write_log_and_record()
        self._folder.remove(CHECKPOINT)

    def _write_derived(self) -> None:
        """Write the files that the checkpoint just written, or just read, determines."""
        began = time.perf_counter()
        state = self._state
        if state.is_fresh and state.mask is not None:
            self._folder.save(MASK, state.mask.save)
        if self._best is not None:
            self._folder.write(BEST, state.network_bytes(self._best, state.record.best))
            self._best = None
        self._write_log_and_record()
        self._derived = time.perf_counter()
        self._deriving = self._derived - began

    def _write_log_and_record(self) -> None:
        record = self._state.record
        self._folder.write(LOG, log_text(record).encode())
        self._folder.write(RECORD, record.to_json().encode())

    def _checkpoint(self) -> Checkpoint:
        path = self._folder.path / CHECKPOINT
        try:
            return Checkpoint.from_bytes(self._folder.read(CHECKPOINT), path, self._state.device)
        except ValueError as error:
            left = self._best_left()
            raise ValueError(f"{error}; remove it to begin this run again{left}") from error

    def _best_left(self) -> str:
        try:
            contents = self._folder.read(BEST)
            _, metadata = network_in(contents, self._folder.path / BEST)
            return f" ({BEST} beside it, of epoch {metadata['epoch']}, can be read)"
        except (OSError, ValueError, KeyError):
            return ""

    def _needed(self, name: str, read: Callable[[bytes, Path], T]) -> T:
        """Read a file that a run which goes on cannot do without."""
        path = self._folder.path / name
        try:
            return read(self._folder.read(name), path)
        except FileNotFoundError:
            problem = f"{path} is missing"
        except ValueError as error:
            problem = str(error)
        raise ValueError(f"{problem}; remove {CHECKPOINT} beside it to begin this run again")
