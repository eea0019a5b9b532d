"""A run in memory: its network as it is now, how that is trained, and what is known of it."""

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lossprune.experiment.growing import GrowingRecord, StepDecay
from lossprune.experiment.network_file import network_bytes
from lossprune.experiment.prepare import Setting, dataset_key
from lossprune.experiment.progress import Progress
from lossprune.experiment.ranks import Ranks
from lossprune.experiment.record import EpochRecord, RunRecord, Scores
from lossprune.pruning import Mask
from lossprune.pruning.prunable import prunable_weights
from lossprune.training import (
    DivergedError,
    Forward,
    Training,
    choose_training,
    dense_training,
    make_optimizer,
)


class RunState:
    """Network, mask, optimizer and record of a run between two steps of it.

    Attributes:
        config: what is to be done.
        device, dataset, network: with what; the network changes with every epoch.
        ranks: the processes that do it together.
        progress: who is told.
        mask: what is pruned so far.
        training: how the next epoch is trained, if it is trained alone.
        optimizer, schedule: of this network, begun anew when it is pruned.
    """

    def __init__(self, setting: Setting, ranks: Ranks, progress: Progress) -> None:
        self.config = setting.config
        self.device = setting.device
        self.dataset = setting.dataset
        self.network = setting.network
        self.ranks = ranks
        self.progress = progress
        self.mask: Mask | None = None
        self._growing = GrowingRecord(
            RunRecord(
                config=setting.config.settings,
                environment=setting.environment,
                start=setting.start,
                prunable=sum(it.numel() for it in prunable_weights(setting.network).values()),
            )
        )
        self._forward = Forward(self.network, self.config.amp, compiled=self.config.compiled)
        self.training: Training = dense_training(
            self.network, self.dataset, "nothing is pruned", self._forward
        )
        self._mode: str | None = None  # that the record says of the next epoch, where it is known
        self._clock = time.perf_counter()
        self.restart_optimizer()

    @property
    def record(self) -> RunRecord:
        """What is known of the run."""
        return self._growing.whole

    @property
    def status(self) -> str:
        """As in the record."""
        return self._growing.status

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self._growing.epoch

    @property
    def prunes_now(self) -> bool:
        """Whether the next step is to prune."""
        return self.epoch == self.config.prune_epoch and not self._growing.is_pruned

    @property
    def is_pruning(self) -> bool:
        """Whether the network is that which is being pruned."""
        return self.record.before_pruning is not None and self.record.after_pruning is None

    @property
    def is_fresh(self) -> bool:
        """Whether the network has just been pruned and not been trained since."""
        pruned = self.record.after_pruning
        return pruned is not None and pruned.epoch == self.epoch

    @property
    def is_best(self) -> bool:
        """Whether the network is that of the best epoch so far."""
        best, last = self.record.best, self.record.last
        return best is not None and last is not None and best.epoch == last.epoch

    @property
    def generator(self) -> torch.Generator:
        """What draws the order of the next epoch, anew for each."""
        return torch.Generator().manual_seed(self.config.seed + self.epoch + 1)

    def conditions(self) -> tuple[object, ...]:
        """What a measurement of a network depends on beside the network, to the last bit."""
        threads = torch.get_num_threads()
        return *dataset_key(self.config), str(self.device), threads, self.ranks.world

    def take_record(self, record: RunRecord) -> None:
        """Go on from this record."""
        self._growing = GrowingRecord(record)
        self._mode = None

    def change(self, **changes: object) -> None:
        """Change fields of the record, and count the seconds since it last changed."""
        seconds = self.record.seconds + self._lap()
        record = replace(self.record, seconds=seconds, **changes)  # type: ignore[arg-type]
        self._growing = GrowingRecord(record)

    def add_epoch(self, scores: Scores, seconds: float, *, own: bool) -> bool:
        """Add an epoch of so many seconds; return whether it is the best so far.

        ``own``: it was trained here alone, and what has gone by since the record last changed is
        the run's; else the run has only taken these seconds.

        Raises:
            DivergedError: a loss is not finite; nothing is added.
        """
        check_finite(scores, f"after epoch {self.epoch + 1}")
        self.schedule.step()
        spent = self._lap()
        row = EpochRecord(self.epoch + 1, scores, seconds)
        return self._growing.add(row, spent if own else seconds)

    def restart_clock(self) -> None:
        """Count seconds from now on: others have computed meanwhile."""
        self._clock = time.perf_counter()

    def _lap(self) -> float:
        now = time.perf_counter()
        spent, self._clock = now - self._clock, now
        return spent

    def restart_optimizer(self) -> None:
        """Begin anew with optimizer and schedule; what the mask removes stays removed."""
        config = self.config
        self.optimizer = make_optimizer(self.network, lr=config.lr, l2=config.l2)
        self.schedule = StepDecay(self.optimizer, config.decay_every, config.decay)
        if self.mask is not None:
            self.mask.enforce(self.network, self.optimizer)

    def evaluate(self) -> Scores:
        """Return loss and error of the network on the three splits."""
        train, valid, test = (
            self.training.evaluate(split) for split in self.dataset.scored.values()
        )
        return Scores(train.loss, train.error, valid.loss, valid.error, test.loss, test.error)

    def choose_training(self) -> None:
        """Choose how to fine-tune the pruned network, and record it."""
        assert self.mask is not None
        self.training = choose_training(
            self.network, self.mask, self.dataset, self.config.train, self._forward
        )
        self.note_training(self.training.mode, self.training.reason)

    def keep_training(self) -> None:
        """Go on in the way that the run began; densely, where it was trained with others."""
        now = self.record.training[-1] if self.record.training else None
        alone = self.ranks.world == 1
        if alone and now and now["mode"] in ("dense", "stacked") and self.config.train == "auto":
            self.training = dense_training(self.network, self.dataset, now["reason"], self._forward)
        else:
            self.choose_training()

    def note_training(self, mode: str, reason: str) -> None:
        """Record how the next epoch is trained, where that is another way than before."""
        if mode == self._mode and mode != "distributed":
            return
        epoch = self.epoch + 1
        noted = tuple(it for it in self.record.training if it["from_epoch"] < epoch)
        # Of several processes the reason names the number, which may change where a run goes on.
        same = "mode", *(["reason"] if mode == "distributed" else [])
        way = {"mode": mode, "reason": reason}
        if not noted or any(noted[-1][name] != way[name] for name in same):
            noted = (*noted, {"from_epoch": epoch, **way})
        if noted != self.record.training:
            self.change(training=noted)
            self.progress.note(f"training: {mode}, {reason}")
        self._mode = mode

    def network_bytes(self, weights: Mapping[str, Tensor], at: EpochRecord | None) -> bytes:
        """Return the file of a network of this run, with these weights, from this epoch."""
        metadata = {
            "architecture": self.config.arch,
            "dataset": self.config.dataset_name,
            "shape": list(self.dataset.shape),
            "classes": list(self.dataset.classes),
            "epoch": 0 if at is None else at.epoch,
            "sparsity": self.record.sparsity,
        }
        return network_bytes(weights, metadata)


def check_finite(scores: Scores, when: str) -> None:
    """Raise DivergedError where a loss is not finite."""
    if not scores.finite:
        raise DivergedError(f"a loss {when} is not finite")
