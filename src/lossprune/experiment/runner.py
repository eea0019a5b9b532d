"""One run: train or load, prune, fine-tune, record; killed at any moment, it goes on."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lossprune.experiment.cache import Cache
from lossprune.experiment.checkpoint import Checkpoint
from lossprune.experiment.config import RunConfig
from lossprune.experiment.folder import BEST, CHECKPOINT, LAST, LOG, MASK, RECORD, RunFolder
from lossprune.experiment.network_file import network_bytes, weights_sha256
from lossprune.experiment.prepare import (
    Setting,
    StageExamples,
    computing,
    dataset_key,
    prepare,
)
from lossprune.experiment.progress import Progress, Silent
from lossprune.experiment.record import (
    DIVERGED,
    FINISHED,
    EpochRecord,
    RunRecord,
    Scores,
    describe,
    describe_stage,
)
from lossprune.pruning import CRITERIA, Mask, Statistics, prune_by_stage
from lossprune.pruning.prunable import prunable_weights
from lossprune.training import (
    DenseTraining,
    DivergedError,
    Training,
    choose_training,
    make_optimizer,
)


def run(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    cache: Cache | None = None,
    checkpoint_seconds: float = 0.0,
) -> RunRecord:
    """Do the run that ``config`` describes, or what is left of it, and return its record.

    Everything is in ``config.folder`` when it returns; a run found finished is not touched.
    ``cache`` is what runs in one process share: data, start network, its evaluation and its first
    stage's statistics.  Between two checkpoints of pruning stages at least ``checkpoint_seconds``
    go by; 0 keeps every stage.  Neither changes the result.

    Raises:
        ValueError, FileNotFoundError: as :func:`lossprune.experiment.prepare.prepare`; another
            process has the folder; it cannot be written; it belongs to another ``--model_0``.
    """
    folder = RunFolder(config.folder)
    record = folder.settled()
    if record is not None:
        return record
    unfinished = folder.record()
    with computing(config, unfinished):
        setting = prepare(config, unfinished, cache)
        with folder.locked():
            # Another process may have finished it while this one was loading the data.
            return (
                folder.settled()
                or _Run(
                    setting, folder, progress or Silent(), cache or Cache(), checkpoint_seconds
                ).finish()
            )


class _Run:
    """A run under way: each step ends in a checkpoint that holds all of it."""

    def __init__(
        self,
        setting: Setting,
        folder: RunFolder,
        progress: Progress,
        cache: Cache,
        checkpoint_seconds: float,
    ) -> None:
        self.config = setting.config
        self.device = setting.device
        self.dataset = setting.dataset
        self.network = setting.network
        self.folder = folder
        self.progress = progress
        self.cache = cache
        self.checkpoint_seconds = checkpoint_seconds
        self.mask: Mask | None = None
        self.record = RunRecord(
            config=setting.config.settings,
            environment=setting.environment,
            start=setting.start,
            prunable=sum(weight.numel() for weight in prunable_weights(setting.network).values()),
        )
        self.training: Training = DenseTraining(self.network, self.dataset, "nothing is pruned")
        self._restart_optimizer()
        self._clock = self._saved = time.perf_counter()

    def finish(self) -> RunRecord:
        """Do all steps that are left."""
        try:
            if (self.folder.path / CHECKPOINT).exists():
                self._resume()
            else:
                self._begin()
            while self._step():
                pass
        except DivergedError as error:
            self._settle(DIVERGED, str(error))
        else:
            self._settle(FINISHED)
        return self.record

    @property
    def epoch(self) -> int:
        return len(self.record.epochs)

    def _step(self) -> bool:
        """Prune or train one epoch; False where neither is left to do."""
        if self.epoch == self.config.prune_epoch and self.record.after_pruning is None:
            self._prune()
        elif self.epoch < self.config.epochs:
            self._train()
        else:
            return False
        return True

    def _begin(self) -> None:
        key = (self.record.start.weights_sha256, *self._conditions())
        scores = self.cache.get("scores", key, self._evaluate)
        self.progress.note(f"start: {describe(scores)}")
        now = EpochRecord(0, scores)
        self._commit(best=now, last=now)
        self._check(scores, "of the start network")

    def _resume(self) -> None:
        saved = Checkpoint.from_file(self.folder.path / CHECKPOINT, self.device)
        if saved.record.start.weights_sha256 != self.record.start.weights_sha256:
            raise ValueError(
                f"{self.folder.path} was begun from another start network "
                f"({saved.record.start.path}); give --path another folder"
            )
        self.record = saved.record
        self.network.load_state_dict(dict(saved.network))
        if self.record.after_pruning is not None:
            if self.epoch == self.record.after_pruning.epoch:
                self.mask = Mask(dict(saved.mask), criterion=self.config.criterion)
            else:
                self.mask = Mask.load(self.folder.path / MASK)
            self._restart_optimizer()
            self._choose_training()
        elif saved.mask:
            self.mask = Mask(dict(saved.mask), criterion=self.config.criterion)
        self.optimizer.load_state_dict(dict(saved.optimizer))
        self.schedule.load_state_dict(dict(saved.schedule))
        self._write_derived()
        where = f"epoch {self.epoch}"
        if self._is_pruning:
            where = f"pruning stage {len(self.record.stages)}"
        self.progress.note(f"going on after {where}")

    def _train(self) -> None:
        epoch = self.epoch + 1
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        try:
            self.training.train_epoch(self.optimizer, generator=generator)
        except DivergedError as error:
            raise DivergedError(f"epoch {epoch}: {error}") from None
        self.schedule.step()
        scores = self._evaluate()
        self._check(scores, f"after epoch {epoch}")
        row = EpochRecord(epoch, scores, time.perf_counter() - began)
        best = self.record.best
        if best is None or scores.valid_error < best.scores.valid_error:
            best = row
        self._commit(epochs=(*self.record.epochs, row), best=best, last=row)
        self.progress.advance("epoch", epoch, self.config.epochs, describe(scores))

    def _prune(self) -> None:
        config = self.config
        if not self._is_pruning:
            self._take_best()
            self._commit(before_pruning=self.record.best)
        examples = StageExamples(self.dataset, config.examples, config.seed)
        completed = len(self.record.stages)
        examples.stage = completed + 1
        if completed < config.stages:
            for mask, stage in prune_by_stage(
                self.network,
                config.criterion,
                sparsity=config.sparsity,
                data=examples,
                examples=config.examples,
                stages=config.stages,
                schedule=config.schedule,
                reg=config.reg,
                estimator=config.estimator,
                seed=config.seed,
                start=self.mask,
                completed=completed,
                recall=self._recall,
            ):
                self.mask = mask
                self._set(stages=(*self.record.stages, asdict(stage)), removed=mask.removed)
                if time.perf_counter() - self._saved >= self.checkpoint_seconds:
                    self._commit()
                told = describe_stage(asdict(stage), config.stages).split(": ", 1)[1]
                self.progress.advance("stage", stage.stage, config.stages, told)
                examples.stage += 1
        self._apply_mask()

    def _recall(self, stage: int, measure: Callable[[], Statistics]) -> Statistics:
        """Measure, or share the first stage: from the second one on each run has its own mask."""
        if stage > 1:
            return measure()
        criterion = CRITERIA[self.config.criterion]
        key = (
            weights_sha256(self.network.state_dict()),
            (criterion.gradient, criterion.curvature, self.config.examples),
            self.config.estimator,
            *self._conditions(),
        )
        return self.cache.get("statistics", key, measure)

    def _conditions(self) -> tuple[object, ...]:
        """What else a measurement of a network depends on, to the last bit."""
        return *dataset_key(self.config), str(self.device), torch.get_num_threads()

    def _apply_mask(self) -> None:
        assert self.mask is not None  # there is at least one stage
        self.mask.apply_(self.network)
        self._restart_optimizer()
        self._choose_training()  # which evaluates, too
        pruned = EpochRecord(self.epoch, self._evaluate())
        self._commit(
            after_pruning=pruned,
            best=pruned,
            last=pruned,
            removed=self.mask.removed,
        )
        self.progress.note(f"pruned: {describe(pruned.scores)}")
        self._check(pruned.scores, "after pruning")

    def _choose_training(self) -> None:
        """Choose how to fine-tune, and record it; a run goes on in the way that it began."""
        assert self.mask is not None
        before = self.record.training[-1]["mode"] if self.record.training else None
        if self.config.train == "auto" and before == "dense":
            return
        self.training = choose_training(self.network, self.mask, self.dataset, self.config.train)
        if self.training.mode != before:
            now = {"from_epoch": self.epoch + 1, "mode": self.training.mode}
            now["reason"] = self.training.reason
            self._set(training=(*self.record.training, now))
            self.progress.note(f"training: {self.training.mode}, {self.training.reason}")

    def _settle(self, status: str, message: str | None = None) -> None:
        """Write what a run leaves, the record last; what only an unfinished one needs goes."""
        saved = Checkpoint.from_file(self.folder.path / CHECKPOINT, self.device)
        self.network.load_state_dict(dict(saved.network))  # where it diverged, the epoch before
        self.folder.write(LAST, self._network_bytes(self.record.last))
        self._set(status=status, message=message)
        self.folder.write(LOG, self.record.to_log().encode())
        self.folder.write(RECORD, self.record.to_json().encode())
        self.folder.remove(CHECKPOINT)

    def _commit(self, **changes: object) -> None:
        """Take a step as done: checkpoint first, then what can be made again from it."""
        self._set(**changes)
        pruning_or_pruned = self._is_pruning or self._is_fresh
        checkpoint = Checkpoint(
            self.record,
            self.network.state_dict(),
            self.optimizer.state_dict(),
            self.schedule.state_dict(),
            dict(self.mask) if self.mask is not None and pruning_or_pruned else {},
        )
        self.folder.write(CHECKPOINT, checkpoint.to_bytes())
        self._saved = time.perf_counter()
        self._write_derived()

    def _write_derived(self) -> None:
        """Write the files that the checkpoint just written, or just read, determines."""
        if self._is_fresh and self.mask is not None:
            self.folder.save(MASK, self.mask.save)
        if self._best_is_current and not self._is_pruning:
            self.folder.write(BEST, self._network_bytes(self.record.best))
        self.folder.write(LOG, self.record.to_log().encode())
        self.folder.write(RECORD, self.record.to_json().encode())

    @property
    def _best_is_current(self) -> bool:
        best, last = self.record.best, self.record.last
        return best is not None and last is not None and best.epoch == last.epoch

    @property
    def _is_pruning(self) -> bool:
        return self.record.before_pruning is not None and self.record.after_pruning is None

    @property
    def _is_fresh(self) -> bool:
        """Whether the network has just been pruned and not been trained since."""
        pruned = self.record.after_pruning
        return pruned is not None and pruned.epoch == self.epoch

    def _set(self, **changes: object) -> None:
        now = time.perf_counter()
        seconds = self.record.seconds + now - self._clock
        self._clock = now
        self.record = replace(self.record, seconds=seconds, **changes)  # type: ignore[arg-type]

    def _take_best(self) -> None:
        if not self._best_is_current:
            path: Path = self.folder.path / BEST
            best = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(best["state_dict"])

    def _restart_optimizer(self) -> None:
        """Begin anew with optimizer and schedule; what the mask removes stays removed."""
        config = self.config
        self.optimizer = make_optimizer(self.network, lr=config.lr, l2=config.l2)
        self.schedule = torch.optim.lr_scheduler.StepLR(
            self.optimizer, config.decay_every, config.decay
        )
        if self.mask is not None:
            self.mask.enforce(self.network, self.optimizer)

    def _evaluate(self) -> Scores:
        train, valid, test = (
            self.training.evaluate(split)
            for split in (self.dataset.train, self.dataset.valid, self.dataset.test)
        )
        return Scores(train.loss, train.error, valid.loss, valid.error, test.loss, test.error)

    def _check(self, scores: Scores, when: str) -> None:
        if not scores.finite:
            raise DivergedError(f"a loss {when} is not finite")

    def _network_bytes(self, at: EpochRecord | None) -> bytes:
        metadata = {
            "architecture": self.config.arch,
            "dataset": self.config.dataset_name,
            "shape": list(self.dataset.shape),
            "classes": list(self.dataset.classes),
            "epoch": 0 if at is None else at.epoch,
            "sparsity": self.record.sparsity,
        }
        return network_bytes(self.network.state_dict(), metadata)
