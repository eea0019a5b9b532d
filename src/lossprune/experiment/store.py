"""What a run has in its folder, so that a kill at any moment loses little and breaks nothing."""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lossprune.experiment.folder import BEST, CHECKPOINT, LAST, LOG, MASK, RECORD, RunFolder
from lossprune.experiment.log import log_text
from lossprune.experiment.network_file import network_bytes, network_in
from lossprune.experiment.pt_file import check_seal, sealed
from lossprune.experiment.record import EpochRecord, RunRecord, Start
from lossprune.pruning import Mask

T = TypeVar("T")

_FORMAT = "lossprune checkpoint 1"
_DERIVING = 0.05  # of the time, at most, ...
_CHEAP_SECONDS = 0.02  # ... unless it takes less than this


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    The best network is in it only where it would be lost otherwise: where it is the current one it
    is in ``network``, and where it is older it has usually been in ``best_model.pt`` since before
    this checkpoint was written.  Random states are not in it: every epoch and every stage draws
    from a generator seeded for it alone.

    Attributes:
        record: as of the last whole epoch or stage.
        network: parameters and buffers; while pruning, the network that is pruned.
        optimizer: state of the optimizer.
        schedule: state of the learning rate's schedule.
        mask: while pruning, the mask after the last whole stage; from the first epoch after it on
            the mask is in its file alone.
        averages: while pruning, what is known of the statistics of earlier stages, where they are
            averaged.
        best: the best network, where it is of an epoch after the checkpoint before this one.
    """

    record: RunRecord
    network: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    mask: Mask | None = None
    averages: Mapping[str, Tensor] = field(default_factory=dict)
    best: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the contents of ``checkpoint.pt``."""
        contents = {
            "format": _FORMAT,
            "record": self.record.to_dict(),
            "network": dict(self.network),
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "mask": dict(self.mask or {}),
            "averages": dict(self.averages),
            "best": dict(self.best),
        }
        return sealed(contents)

    @classmethod
    def from_bytes(cls, file: bytes, path: Path, device: torch.device) -> "Checkpoint":
        """Return what a ``checkpoint.pt`` holds; messages name it ``path``.

        Raises:
            ValueError: it is damaged, which no interruption of a run causes.
        """
        check_seal(file, path)
        try:
            contents = torch.load(io.BytesIO(file), map_location=device, weights_only=True)
            if contents.pop("format") != _FORMAT:
                raise ValueError("of another format")
            record = RunRecord.from_dict(contents.pop("record"))
            kept = contents.pop("mask")
            mask = Mask(kept, criterion=record.config["pm"]) if kept else None
            return cls(record=record, mask=mask, **contents)
        except Exception as error:  # torch raises half a dozen kinds
            raise ValueError(f"{path} cannot be read ({type(error).__name__})") from error


class RunStore:
    """The files of one run.

    The checkpoint is what a run goes on from, and is written first.  Mask, best network, log and
    record can be made again from it; the last two grow with every epoch, so they are written less
    often where epochs are short.

    Args:
        folder: of the run, held by this process.
        about: the metadata of its networks that no epoch changes.
        device: where what is read goes.
        seconds: that go by between two checkpoints, or more; 0: one after every stage and epoch.

    Attributes:
        saved_epoch: how many epochs the checkpoint is after, or None.
    """

    def __init__(
        self, folder: RunFolder, about: Mapping[str, Any], device: torch.device, seconds: float
    ) -> None:
        self.seconds = seconds
        self.saved_epoch: int | None = None
        self._folder = folder
        self._about = about
        self._device = device
        self._best: Mapping[str, Tensor] | None = None  # where its file does not hold it yet
        self._saved = self._derived = time.perf_counter()
        self._deriving = 0.0  # seconds that writing what is derived took, the last time

    def settled(self) -> RunRecord | None:
        """Return the record of the run where it has come to its end."""
        return self._folder.settled()

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.perf_counter() - self._saved >= self.seconds

    @property
    def derives_now(self) -> bool:
        """Whether writing log and record again takes a small share of the time since the last."""
        since = time.perf_counter() - self._derived
        return self._deriving <= max(_CHEAP_SECONDS, _DERIVING * since)

    def save(self, now: Checkpoint, *, derived: bool = True) -> None:
        """Write the checkpoint, then what can be made again from it; log and record are in that."""
        best = self._best
        if now.record.ends_best and not now.record.is_pruning:
            self._best, best = now.network, None
        self._folder.write(CHECKPOINT, replace(now, best=best or {}).to_bytes())
        self.saved_epoch = len(now.record.epochs)
        self._saved = time.perf_counter()
        if derived:
            self.derive(now)
        elif self._best is now.network:
            self.keep_best(now.network)  # before it is trained further

    def keep_best(self, network: Mapping[str, Tensor]) -> None:
        """Keep a copy of a network, which is the best so far, until it is saved."""
        self._best = {name: tensor.clone() for name, tensor in network.items()}

    def read_best(self) -> dict[str, Tensor]:
        """Return the weights of the best network.

        Raises:
            ValueError: its file is missing or damaged.
        """
        weights, _ = self._needed(BEST, network_in)
        return weights

    def restore(self, start: Start, data: str | None = None) -> Checkpoint | None:
        """Return what a run with this start network goes on from, where there is something.

        Args:
            start: the network.
            data: the SHA-256 of data of the user's own.

        Raises:
            ValueError: it, or what it needs beside it, is damaged; or it was begun from another
                start network, or with other data.
        """
        if not self._folder.has(CHECKPOINT):
            return None
        saved = self._checkpoint()
        record = saved.record
        if record.start.weights_sha256 != start.weights_sha256:
            raise ValueError(f"{self._folder.path} {_begun_otherwise(record, start)}")
        if record.own.get("data") != data:
            raise ValueError(
                f"{self._folder.path} was begun with other data than --dataset "
                f"{record.config['dataset']} loads now; give --path another folder"
            )
        self.saved_epoch, self._best = len(record.epochs), None
        if record.after_pruning is not None and not record.is_just_pruned:
            saved = replace(saved, mask=self._needed(MASK, Mask.from_bytes))
        if saved.best:
            self._best = saved.best
        elif record.ends_best and not record.is_pruning:
            self._best = saved.network
        elif not record.is_pruning:  # then the best will be one of those that are pruned
            self.read_best()
        return saved

    def derive(self, now: Checkpoint) -> None:
        """Write the files that the checkpoint just written, or just read, determines."""
        began = time.perf_counter()
        if now.record.is_just_pruned and now.mask is not None:
            self._folder.save(MASK, now.mask.save)
        self._write_best(now.record)
        self._write_log_and_record(now.record)
        self._derived = time.perf_counter()
        self._deriving = self._derived - began

    def save_mask(self, mask: Mask) -> None:
        """Write the mask of a network that was pruned before the run."""
        self._folder.save(MASK, mask.save)

    def leave_last(self, record: RunRecord, network: Mapping[str, Tensor] | None) -> None:
        """Write the last network: this one, or where a run diverged that of the checkpoint.

        So is the best one, where it is in the checkpoint alone.
        """
        self._write_best(record)
        last = self._checkpoint().network if network is None else network
        self._folder.write(LAST, self._network(last, record, record.last))

    def settle(self, record: RunRecord) -> None:
        """Write log and record of a run at its end; what only an unfinished one needs goes."""
        self._write_log_and_record(record)
        self._folder.remove(CHECKPOINT)

    def _write_best(self, record: RunRecord) -> None:
        if self._best is not None:
            self._folder.write(BEST, self._network(self._best, record, record.best))
            self._best = None

    def _write_log_and_record(self, record: RunRecord) -> None:
        self._folder.write(LOG, log_text(record).encode())
        self._folder.write(RECORD, record.to_json().encode())

    def _network(
        self, weights: Mapping[str, Tensor], record: RunRecord, at: EpochRecord | None
    ) -> bytes:
        """The file of a network of this run, with these weights, from this epoch."""
        epoch = 0 if at is None else at.epoch
        metadata = {**self._about, "epoch": epoch, "sparsity": record.sparsity}
        return network_bytes(weights, metadata)

    def _checkpoint(self) -> Checkpoint:
        path = self._folder.path / CHECKPOINT
        try:
            return Checkpoint.from_bytes(self._folder.read(CHECKPOINT), path, self._device)
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


def _begun_otherwise(record: RunRecord, start: Start) -> str:
    if record.start.path is None and start.path is None:
        return (
            f"was begun from another network than --arch {record.config['arch']} builds now "
            f"from seed {record.config['seed']}; give --path another folder"
        )
    return f"was begun from another start network ({record.start.path}); give --path another folder"
