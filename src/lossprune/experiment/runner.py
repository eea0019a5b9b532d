"""One run: train or load, prune, fine-tune, record; killed at any moment, it goes on."""

import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor

from lossprune.experiment.cache import Cache
from lossprune.experiment.checkpoint import Checkpoint
from lossprune.experiment.config import RunConfig
from lossprune.experiment.folder import BEST, CHECKPOINT, LAST, LOG, MASK, RECORD
from lossprune.experiment.growing import GrowingRecord, StepDecay
from lossprune.experiment.network_file import network_bytes, weights_sha256
from lossprune.experiment.prepare import (
    Setting,
    StageExamples,
    computing,
    dataset_key,
    prepare,
)
from lossprune.experiment.progress import Progress, Silent
from lossprune.experiment.ranks import Ranks, current
from lossprune.experiment.record import (
    DIVERGED,
    FINISHED,
    RUNNING,
    EpochRecord,
    RunRecord,
    Scores,
    describe,
    describe_stage,
)
from lossprune.experiment.shared_folder import SharedFolder
from lossprune.pruning import CRITERIA, Mask, Statistics, prune_by_stage
from lossprune.pruning.prunable import prunable_weights
from lossprune.training import (
    DivergedError,
    Forward,
    Training,
    choose_training,
    dense_training,
    make_optimizer,
)

_DERIVING = 0.05  # of the time, at most, ...
_CHEAP_SECONDS = 0.02  # ... unless it takes less than this


def run(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    cache: Cache | None = None,
    checkpoint_seconds: float = 0.0,
    leave: Callable[["Run"], bool] = lambda _: False,
) -> RunRecord:
    """Do the run that ``config`` describes, or what is left of it, and return its record.

    Everything is in ``config.folder`` when it returns; a run found finished is not touched.
    ``cache`` is what runs in one process share: data, start network, its evaluation and its first
    stage's statistics.  Between two checkpoints ``checkpoint_seconds`` go by or more; 0 keeps every
    stage and epoch.  Neither changes the result.  ``leave`` is asked when the first
    epoch is due: where it says so, the run is left there, saved, and its record says that it is
    still running.

    The processes of an initialised ``torch.distributed`` group do one run together: all call this
    with the same configuration and get the same record; the first one alone writes.

    Raises:
        ValueError, FileNotFoundError: as :func:`lossprune.experiment.prepare.prepare`; another
            process has the folder; it cannot be written; it belongs to another ``--model_0``.
    """
    folder = SharedFolder(config.folder, current())
    record = folder.settled()
    if record is not None:
        return record
    with (
        computing(config, folder.record()),
        opened(config, progress, cache=cache, checkpoint_seconds=checkpoint_seconds) as going,
    ):
        going.begin()
        if going.due and leave(going):
            return going.record
        while going.due:
            going.train()
        return going.record


@contextmanager
def opened(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    cache: Cache | None = None,
    checkpoint_seconds: float = 0.0,
) -> Iterator["Run"]:
    """Prepare a run and hold its folder; arguments and errors as :func:`run`."""
    ranks = current()
    folder = SharedFolder(config.folder, ranks)
    unfinished = folder.record()
    with ranks.together():
        setting = prepare(config, unfinished, cache)
    _check_start(setting, ranks)
    with folder.locked():
        yield Run(
            setting, folder, ranks, progress or Silent(), cache or Cache(), checkpoint_seconds
        )


def _check_start(setting: Setting, ranks: Ranks) -> None:
    """Raise ValueError unless all processes begin from the same weights."""
    here = setting.start.weights_sha256.encode()
    first = ranks.from_first(lambda: here)
    with ranks.together():
        if here != first:
            raise ValueError(
                "the start network of this process is not that of the first one: "
                "--model_0 and torch must be the same on every machine"
            )


class Run:
    """A run under way, one epoch at a time.

    After :meth:`begin` it is pruned as far as it may be, and epochs are :attr:`due` until it has
    come to its end.  Each is either trained here (:meth:`train`) or elsewhere, together with other
    runs, and its scores taken (:meth:`take`); then :meth:`save` makes safe what was done, and
    :meth:`rest` is for a run that :attr:`stops`.
    """

    def __init__(
        self,
        setting: Setting,
        folder: SharedFolder,
        ranks: Ranks,
        progress: Progress,
        cache: Cache,
        checkpoint_seconds: float,
    ) -> None:
        self.config = setting.config
        self.device = setting.device
        self.dataset = setting.dataset
        self.network = setting.network
        self.folder = folder
        self.ranks = ranks
        self.progress = progress
        self.cache = cache
        self.checkpoint_seconds = checkpoint_seconds
        self.mask: Mask | None = None
        self._growing = GrowingRecord(
            RunRecord(
                config=setting.config.settings,
                environment=setting.environment,
                start=setting.start,
                prunable=sum(it.numel() for it in prunable_weights(setting.network).values()),
            )
        )
        self.forward = Forward(self.network, self.config.amp, compiled=self.config.compiled)
        self.training: Training = dense_training(
            self.network, self.dataset, "nothing is pruned", self.forward
        )
        self._restart_optimizer()
        self._unsaved = False
        self._best: Mapping[str, Tensor] | None = None  # where its file does not hold it yet
        self._mode: str | None = None  # that the record says of the next epoch, where it is known
        self._clock = self._saved = time.perf_counter()
        self._derived = self._clock  # when log and record were last written, and ...
        self._deriving = 0.0  # ... the seconds that it took

    def begin(self) -> None:
        """Start, or go on from the checkpoint, up to the next epoch to train."""
        # Another process may have finished it while this one was loading the data.
        settled = self.folder.settled()
        if settled is not None:
            self._growing = GrowingRecord(settled)
            return
        with self._settling():
            if self.folder.has(CHECKPOINT):
                self._resume()
            else:
                self._start()
            self._go_on()

    @property
    def record(self) -> RunRecord:
        """What is known of the run."""
        return self._growing.whole

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self._growing.epoch

    @property
    def due(self) -> bool:
        """Whether an epoch is to be trained; False where the run has come to its end."""
        return self._growing.status == RUNNING

    @property
    def stops(self) -> bool:
        """Whether all epochs are done, or those before pruning: then none is to be trained now."""
        return self.epoch >= self.config.epochs or self._prunes_now

    @property
    def is_saved(self) -> bool:
        """Whether the checkpoint is of the last epoch."""
        return not self._unsaved

    @property
    def generator(self) -> torch.Generator:
        """What draws the order of the epoch that is due, anew for each."""
        return torch.Generator().manual_seed(self.config.seed + self.epoch + 1)

    def train(self) -> None:
        """Train the epoch that is due, alone, and save it where it is time to."""
        began = time.perf_counter()
        with self._settling():
            if self.record.training or self.ranks.world > 1:
                self._note_training(self.training.mode, self.training.reason)
            try:
                best = self._train_epoch(began)
            except DivergedError:
                if self.is_saved:
                    raise
                # It leaves the network of the epoch before, and nobody has that any more: there
                # once more from the checkpoint, now with one after every epoch.
                self.checkpoint_seconds = 0.0
                self.go_back()
                return
            if self.stops or time.perf_counter() - self._saved >= self.checkpoint_seconds:
                self.save(derived=self._derives_now or self.stops)
            elif best:
                self.keep_best()
            self._go_on()

    def _train_epoch(self, began: float) -> bool:
        """Train the epoch that is due, and return whether it is the best so far."""
        try:
            self.training.train_epoch(
                self.optimizer, batch_size=self.config.batch_size, generator=self.generator
            )
        except DivergedError as error:
            raise self._diverged(error) from None
        scores = self._evaluate()
        now = time.perf_counter()
        spent, self._clock = now - self._clock, now
        best = self._add_epoch(scores, now - began, spent)
        self.progress.advance("epoch", self.epoch, self.config.epochs, describe(scores))
        return best

    @property
    def _derives_now(self) -> bool:
        """Whether writing log and record again takes a small share of the time since the last one.

        They grow with every epoch, and a sparse epoch can take less time than writing them.
        """
        since = time.perf_counter() - self._derived
        return self._deriving <= max(_CHEAP_SECONDS, _DERIVING * since)

    def take(self, came: Scores | DivergedError, seconds: float, mode: str, reason: str) -> bool:
        """Take the epoch that was due, trained elsewhere; nothing is saved.

        Args:
            came: of what was trained, from the network and optimizer of this run.
            seconds: this run's share of what it took.
            mode: how it was trained.
            reason: why so.

        Returns:
            Whether it is the best so far: then :meth:`keep_best` is to be called.

        Raises:
            DivergedError: a loss is not finite.  The run is to :meth:`give_up` where it
                :attr:`is_saved`, else to :meth:`go_back` and come here again.
        """
        self.restart_clock()
        if mode != self._mode:
            self._note_training(mode, reason)
        if isinstance(came, DivergedError):
            raise self._diverged(came)
        return self._add_epoch(came, seconds, seconds)

    def keep_best(self) -> None:
        """Keep a copy of the network, which is the best so far, until it is saved."""
        self._best = {name: it.clone() for name, it in self.network.state_dict().items()}

    def rest(self) -> None:
        """Save a run that stops, and settle it where all epochs are done."""
        self.restart_clock()
        self.save()
        if self.epoch >= self.config.epochs:
            self._settle(FINISHED)

    def give_up(self, error: DivergedError) -> None:
        """Settle a run that is saved and whose next epoch diverged."""
        self.restart_clock()
        self._settle(DIVERGED, str(error))

    def go_back(self) -> None:
        """Go back to the checkpoint."""
        self._resume()

    def restart_clock(self) -> None:
        """Count seconds from now on: others have computed meanwhile."""
        self._clock = time.perf_counter()

    def save(self, *, derived: bool = True) -> None:
        """Write what is not yet saved: the checkpoint, then what can be made again from it."""
        if not self._unsaved:
            return
        network, best = self.network.state_dict(), self._best
        if self._best_is_current and not self._is_pruning:
            self._best, best = network, None
        mask = self.mask if self._is_pruning or self._is_fresh else None
        checkpoint = Checkpoint(
            self.record,
            network,
            self.optimizer.state_dict(),
            self.schedule.state_dict(),
            dict(mask or {}),
            best or {},
        )
        self.folder.write(CHECKPOINT, checkpoint.to_bytes())
        self._unsaved = False
        self._saved = time.perf_counter()
        if derived:
            self._write_derived()
        elif self._best is network:
            self.keep_best()  # before it is trained further

    @contextmanager
    def _settling(self) -> Iterator[None]:
        """Take a loss that is not finite as the end of this run."""
        try:
            yield
        except DivergedError as error:
            self._settle(DIVERGED, str(error))

    def _go_on(self) -> None:
        """Prune where that is due; where nothing is, settle."""
        if self._prunes_now:
            self._prune()
        if self.epoch >= self.config.epochs:
            self._settle(FINISHED)

    def _start(self) -> None:
        computed = self.config.amp, self.config.compiled
        key = (self.record.start.weights_sha256, computed, *self._conditions())
        scores = self.cache.get("scores", key, self._evaluate)
        self.progress.note(f"start: {describe(scores)}")
        now = EpochRecord(0, scores)
        self._commit(best=now, last=now)
        self._check(scores, "of the start network")

    def _resume(self) -> None:
        saved = self._checkpoint()
        if saved.record.start.weights_sha256 != self.record.start.weights_sha256:
            raise ValueError(
                f"{self.folder.path} was begun from another start network "
                f"({saved.record.start.path}); give --path another folder"
            )
        self._growing = GrowingRecord(saved.record)
        self._unsaved, self._best, self._mode = False, None, None
        self.network.load_state_dict(dict(saved.network))
        if self.record.after_pruning is not None:
            if self.epoch == self.record.after_pruning.epoch:
                self.mask = Mask(dict(saved.mask), criterion=self.config.criterion)
            else:
                self.mask = Mask.from_bytes(self.folder.read(MASK), self.folder.path / MASK)
            self._restart_optimizer()
            self._keep_training()
        elif saved.mask:
            self.mask = Mask(dict(saved.mask), criterion=self.config.criterion)
        self.optimizer.load_state_dict(dict(saved.optimizer))
        self.schedule.load_state_dict(dict(saved.schedule))
        if saved.best:
            self._best = saved.best
        elif self._best_is_current and not self._is_pruning:
            self._best = saved.network
        self._write_derived()
        where = f"epoch {self.epoch}"
        if self._is_pruning:
            where = f"pruning stage {len(self.record.stages)}"
        self.progress.note(f"going on after {where}")

    def _add_epoch(self, scores: Scores, seconds: float, spent: float) -> bool:
        """Add an epoch of so many seconds; of the run's own time it took those ``spent``."""
        self._check(scores, f"after epoch {self.epoch + 1}")
        self.schedule.step()
        self._unsaved = True
        return self._growing.add(EpochRecord(self.epoch + 1, scores, seconds), spent)

    def _diverged(self, error: DivergedError) -> DivergedError:
        return DivergedError(f"epoch {self.epoch + 1}: {error}")

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
        threads = torch.get_num_threads()
        return *dataset_key(self.config), str(self.device), threads, self.ranks.world

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
        """Choose how to fine-tune, and record it."""
        assert self.mask is not None
        self.training = choose_training(
            self.network, self.mask, self.dataset, self.config.train, self.forward
        )
        self._note_training(self.training.mode, self.training.reason)

    def _keep_training(self) -> None:
        """Go on in the way that the run began; densely, where it was trained with others."""
        now = self.record.training[-1] if self.record.training else None
        alone = self.ranks.world == 1
        if alone and now and now["mode"] in ("dense", "stacked") and self.config.train == "auto":
            self.training = dense_training(self.network, self.dataset, now["reason"], self.forward)
        else:
            self._choose_training()

    def _note_training(self, mode: str, reason: str) -> None:
        """Record how the next epoch is trained, where that is another way than before."""
        epoch = self.epoch + 1
        noted = tuple(it for it in self.record.training if it["from_epoch"] < epoch)
        # Of several processes the reason names the number, which may change where a run goes on.
        same = "mode", *(["reason"] if mode == "distributed" else [])
        way = {"mode": mode, "reason": reason}
        if not noted or any(noted[-1][name] != way[name] for name in same):
            noted = (*noted, {"from_epoch": epoch, **way})
        if noted != self.record.training:
            self._set(training=noted)
            self.progress.note(f"training: {mode}, {reason}")
        self._mode = mode

    def _settle(self, status: str, message: str | None = None) -> None:
        """Write what a run leaves, the record last; what only an unfinished one needs goes.

        The last network is that of the checkpoint: where it diverged, of the epoch before.
        """
        last = self._checkpoint().network if status == DIVERGED else self.network.state_dict()
        self.folder.write(LAST, self._network_bytes(last, self.record.last))
        self._set(status=status, message=message)
        self.folder.write(LOG, self.record.to_log().encode())
        self.folder.write(RECORD, self.record.to_json().encode())
        self.folder.remove(CHECKPOINT)

    def _commit(self, **changes: object) -> None:
        """Take a step as done, and save it."""
        self._set(**changes)
        self._unsaved = True
        self.save()

    def _write_derived(self) -> None:
        """Write the files that the checkpoint just written, or just read, determines."""
        began = time.perf_counter()
        if self._is_fresh and self.mask is not None:
            self.folder.save(MASK, self.mask.save)
        if self._best is not None:
            self.folder.write(BEST, self._network_bytes(self._best, self.record.best))
            self._best = None
        self.folder.write(LOG, self.record.to_log().encode())
        self.folder.write(RECORD, self.record.to_json().encode())
        self._derived = time.perf_counter()
        self._deriving = self._derived - began

    @property
    def _best_is_current(self) -> bool:
        best, last = self.record.best, self.record.last
        return best is not None and last is not None and best.epoch == last.epoch

    @property
    def _prunes_now(self) -> bool:
        return self.epoch == self.config.prune_epoch and not self._growing.is_pruned

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
        record = replace(self.record, seconds=seconds, **changes)  # type: ignore[arg-type]
        self._growing = GrowingRecord(record)

    def _take_best(self) -> None:
        if not self._best_is_current:
            file = io.BytesIO(self.folder.read(BEST))
            best = torch.load(file, map_location=self.device, weights_only=True)
            self.network.load_state_dict(best["state_dict"])

    def _checkpoint(self) -> Checkpoint:
        path = self.folder.path / CHECKPOINT
        return Checkpoint.from_bytes(self.folder.read(CHECKPOINT), path, self.device)

    def _restart_optimizer(self) -> None:
        """Begin anew with optimizer and schedule; what the mask removes stays removed."""
        config = self.config
        self.optimizer = make_optimizer(self.network, lr=config.lr, l2=config.l2)
        self.schedule = StepDecay(self.optimizer, config.decay_every, config.decay)
        if self.mask is not None:
            self.mask.enforce(self.network, self.optimizer)

    def _evaluate(self) -> Scores:
        train, valid, test = (
            self.training.evaluate(split) for split in self.dataset.scored.values()
        )
        return Scores(train.loss, train.error, valid.loss, valid.error, test.loss, test.error)

    def _check(self, scores: Scores, when: str) -> None:
        if not scores.finite:
            raise DivergedError(f"a loss {when} is not finite")

    def _network_bytes(self, weights: Mapping[str, Tensor], at: EpochRecord | None) -> bytes:
        metadata = {
            "architecture": self.config.arch,
            "dataset": self.config.dataset_name,
            "shape": list(self.dataset.shape),
            "classes": list(self.dataset.classes),
            "epoch": 0 if at is None else at.epoch,
            "sparsity": self.record.sparsity,
        }
        return network_bytes(weights, metadata)
