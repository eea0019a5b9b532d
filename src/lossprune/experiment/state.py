"""A run in memory: its network as it is now, how that is trained, and what is known of it."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lossprune.experiment.asked_pruning import weights_of
from lossprune.experiment.prepare import PreparedRun, dataset_key
from lossprune.experiment.ranks import Ranks
from lossprune.experiment.record import RunRecord, Scores
from lossprune.experiment.record_builder import RecordBuilder
from lossprune.experiment.store import Checkpoint
from lossprune.progress import Progress
from lossprune.training import (
    CompactedTraining,
    DivergedError,
    Forward,
    Training,
    choose_training,
    dense_training,
    make_optimizer,
)


class RunState(RecordBuilder):
    """Network, mask, optimizer and record of a run between two steps of it.

    Attributes:
        config: what is to be done.
        device, dataset, network: with what; the network changes with every epoch.
        ranks: the processes that do it together.
        progress: who is told.
        start_mask: what was removed from the network before the run; None: nothing.
        mask: what is pruned so far.
        averages: of the statistics of the stages so far, where they are averaged.
        training: how the next epoch is trained, if it is trained alone.
        optimizer, schedule: of this network, begun anew when it is pruned.
    """

    def __init__(self, prepared: PreparedRun, ranks: Ranks, progress: Progress) -> None:
        self.config = prepared.config
        self.device = prepared.device
        self.dataset = prepared.dataset
        self.network = prepared.network
        self.ranks = ranks
        self.progress = progress
        self.start_mask = self.mask = prepared.mask
        self.averages: Mapping[str, Tensor] = {}
        weights = weights_of(prepared.config, prepared.network)
        weights = {**weights, **(prepared.mask or {})}.values()
        super().__init__(
            RunRecord(
                config=prepared.config.settings,
                environment=prepared.environment,
                start=prepared.start,
                prunable=sum(weight.numel() for weight in weights),
                removed=prepared.start.removed,
                own=prepared.own,
            )
        )
        self._forward = Forward(self.network, self.config.amp, compiled=self.config.compiled)
        self.training: Training = dense_training(
            self.network, self.dataset, "nothing is pruned", self._forward
        )
        self._mode: str | None = None  # that the record says of the next epoch, where it is known
        self.restart_optimizer()

    @property
    def is_trained(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.config.epochs

    @property
    def prunes_now(self) -> bool:
        """Whether the next step is to prune."""
        return self.epoch == self.config.prune_epoch and self._record.after_pruning is None

    @property
    def generator(self) -> torch.Generator:
        """What draws the order of the next epoch, anew for each."""
        return torch.Generator().manual_seed(self.config.seed + self.epoch + 1)

    def conditions(self) -> tuple[object, ...]:
        """What a measurement of a network depends on beside the network, to the last bit."""
        where = str(self.device), torch.get_num_threads(), self.ranks.world
        return self.config.arch, *dataset_key(self.config), *where

    def checkpoint(self) -> Checkpoint:
        """Return what the run could go on from; its tensors are those of the run itself."""
        record = self.record
        return Checkpoint(
            record,
            self.network.state_dict(),
            self.optimizer.state_dict(),
            self.schedule.state_dict(),
            self.mask if record.is_pruning or record.is_just_pruned else None,
            averages=self.averages if record.is_pruning else {},
        )

    def go_on_from(self, saved: Checkpoint) -> None:
        """Be as the run was then; where it was pruned before, with the mask."""
        self.take_record(saved.record)
        self.network.load_state_dict(dict(saved.network))
        if saved.mask is not None:
            self.mask = saved.mask
        self.averages = saved.averages
        begun = saved.record.after_pruning is not None or self.start_mask is not None
        if begun and not self.prunes_now:  # else the way to train is chosen after pruning
            self.restart_optimizer()
            self._keep_training()
        self.optimizer.load_state_dict(dict(saved.optimizer))
        self.schedule.load_state_dict(dict(saved.schedule))

    def take_record(self, record: RunRecord) -> None:
        """Go on from this record."""
        self._take(record)
        self._mode = None

    def add_epoch(self, scores: Scores, seconds: float) -> bool:
        """Add an epoch of so many seconds; return whether it is the best so far.

        Raises:
            DivergedError: a loss is not finite; nothing is added.
        """
        check_finite(scores, f"after epoch {self.epoch + 1}")
        self.schedule.step()
        return super().add_epoch(scores, seconds)

    def train_epoch(self) -> tuple[Scores | DivergedError, float]:
        """Train the next epoch, alone; return its scores, or how it diverged, and its seconds."""
        began = time.perf_counter()
        if self._record.training or self.ranks.world > 1:
            self.note_training(self.training.mode, self.training.reason)
        try:
            self.training.train_epoch(
                self.optimizer, batch_size=self.config.batch_size, generator=self.generator
            )
        except DivergedError as error:
            return error, time.perf_counter() - began
        return self.evaluate(), time.perf_counter() - began

    def evaluate(self) -> Scores:
        """Return loss and error of the network on the three splits."""
        train, valid, test = (
            self.training.evaluate(split) for split in self.dataset.scored.values()
        )
        return Scores(train.loss, train.error, valid.loss, valid.error, test.loss, test.error)

    def restart_optimizer(self) -> None:
        """Begin anew with optimizer and schedule; what the mask removes stays removed."""
        config = self.config
        self.optimizer = make_optimizer(self.network, lr=config.lr, l2=config.l2)
        self.schedule = StepDecay(self.optimizer, config.decay_every, config.decay)
        if self.mask is not None:
            self.mask.enforce(self.network, self.optimizer)

    def choose_training(self) -> None:
        """Choose how to fine-tune the pruned network, and record it."""
        assert self.mask is not None
        self.training = choose_training(
            self.network, self.mask, self.dataset, self.config.train, self._forward
        )
        self.note_training(self.training.mode, self.training.reason)

    def _keep_training(self) -> None:
        """Go on in the way that the run began; densely, where it was trained with others."""
        noted = self._record.training
        free = self.ranks.world == 1 and self.config.train == "auto"
        now = noted[-1] if noted and free else None
        if now and now["mode"] in ("dense", "stacked"):
            self.training = dense_training(self.network, self.dataset, now["reason"], self._forward)
        elif now and now["mode"] == "compacted":
            assert self.mask is not None
            self.training = CompactedTraining(self.network, self.mask, self.dataset, self._forward)
        else:
            self.choose_training()

    def note_training(self, mode: str, reason: str) -> None:
        """Record how the next epoch is trained, where that is another way than before."""
        if mode == self._mode and mode != "distributed":
            return
        epoch = self.epoch + 1
        before = self._record.training
        noted = tuple(way for way in before if way["from_epoch"] < epoch)
        # Of several processes the reason names the number, which may change where a run goes on.
        same = "mode", *(["reason"] if mode == "distributed" else [])
        way = {"mode": mode, "reason": reason}
        if not noted or any(noted[-1][name] != way[name] for name in same):
            noted = (*noted, {"from_epoch": epoch, **way})
        if noted != before:
            self.change(training=noted)
            self.progress.note(f"training: {mode}, {reason}")
        self._mode = mode


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


def check_finite(scores: Scores, when: str) -> None:
    """Raise DivergedError where a loss is not finite."""
    if not scores.finite:
        raise DivergedError(f"a loss {when} is not finite")
