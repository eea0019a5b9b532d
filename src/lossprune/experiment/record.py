"""What is known of a run: its record (``record.json``) and its log (``log.txt``).

No torch here, so that thousands of records can be read in a moment.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lossprune.json_text import digest_of, parse_json

LOG_HEADER = "n\ttrain_l\ttrain_m\tvalid_l\tvalid_m\ttest_l\ttest_m\ttime"

# The published log's rows are counted from 0, and its training columns are means over the epoch's
# batches while the network was trained.  Ours are what every other column is: an evaluation.
_LOG_COMMENT = (
    "row n, counted from 0, is the network after epoch n + 1",
    "train_l and train_m are evaluations of it, as the other columns, without augmentation: "
    "not means over the epoch's batches in training mode",
)

_DIGEST = "sha256"

_LONGEST = 1000  # line that is shown

RUNNING, FINISHED, DIVERGED = "running", "finished", "diverged"


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy and error rate on the three splits, the training one un-augmented."""

    train_loss: float
    train_error: float
    valid_loss: float
    valid_error: float
    test_loss: float
    test_error: float

    @property
    def finite(self) -> bool:
        """Whether all of them are numbers."""
        return all(map(math.isfinite, vars(self).values()))


@dataclass(frozen=True)
class EpochRecord:
    """Scores after one epoch, and the seconds it took; epoch 0 is a network before training."""

    epoch: int
    scores: Scores
    seconds: float = 0.0


@dataclass(frozen=True)
class Start:
    """The network that a run began from: a file, or one newly built from the seed.

    Attributes:
        path: the file, or None.
        sha256: of the file's bytes, or None.
        weights_sha256: of the names, types, shapes and bytes of all tensors.
    """

    path: str | None
    sha256: str | None
    weights_sha256: str


@dataclass(frozen=True)
class RunRecord:
    """One run, from its settings to its results.

    Attributes:
        config: what determines the result, by flag.
        environment: versions, device, machine, threads of each process, processes.
        start: the network it began from.
        status: ``"running"``, ``"finished"`` or ``"diverged"``.
        message: why it diverged, or None.
        before_pruning: the network about to be pruned, at the epoch it comes from.
        after_pruning: the same network with the mask applied, at the epoch of pruning.
        best: the network in ``best_model.pt``: lowest validation error, of the pruned ones if any.
        last: the network in ``last_model.pt``.
        stages: one dictionary per pruning stage, as :class:`lossprune.StageRecord` names them.
        removed: weights removed.
        prunable: prunable weights in all.
        epochs: one record per epoch trained.
        training: how the pruned network was trained, and one before pruning by several processes
            or together with others: dictionaries of ``from_epoch``, ``mode`` (``"dense"``,
            ``"compacted"``, ``"sparse"``, ``"stacked"`` or ``"distributed"``) and ``reason``;
            usually one.
        seconds: of computing, over all attempts that ended in a whole epoch or stage.
    """

    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    start: Start
    status: str = RUNNING
    message: str | None = None
    before_pruning: EpochRecord | None = None
    after_pruning: EpochRecord | None = None
    best: EpochRecord | None = None
    last: EpochRecord | None = None
    stages: tuple[Mapping[str, Any], ...] = ()
    removed: int = 0
    prunable: int = 0
    epochs: tuple[EpochRecord, ...] = ()
    training: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0
    format: str = field(default="lossprune record 1")

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that is removed."""
        return self.removed / self.prunable if self.prunable else 0.0

    def until(self, epochs: int) -> "RunRecord":
        """Return the record that the run would have with so many epochs, if it is a longer one.

        No learning rate depends on how many epochs come after it, so a run's first epochs are those
        of a shorter run.  Only a run that was pruned by then, and has trained so far, is shortened.
        """
        pruned = self.after_pruning
        so_far = len(self.epochs) >= epochs and self.config["nepochs"] > epochs
        if pruned is None or pruned.epoch > epochs or not so_far:
            return self
        rows, later = self.epochs[:epochs], self.epochs[epochs:]
        candidates = (pruned, *rows[pruned.epoch :])
        return replace(
            self,
            config={**self.config, "nepochs": epochs},
            status=FINISHED,
            message=None,
            best=min(candidates, key=lambda row: row.scores.valid_error),  # the first of equals
            last=candidates[-1],
            epochs=rows,
            training=tuple(it for it in self.training if it["from_epoch"] <= epochs),
            seconds=self.seconds - sum(row.seconds for row in later),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return dictionaries, lists, numbers and strings; what is not finite becomes None."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**_plain(values), "sparsity": self.sparsity}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunRecord":
        """Return the record that :meth:`to_dict` described."""
        known = {name: it for name, it in values.items() if name not in ("sparsity", _DIGEST)}
        for name in ("before_pruning", "after_pruning", "best", "last"):
            known[name] = _epoch(known.get(name))
        known["epochs"] = tuple(_epoch(row) for row in known.get("epochs", ()))
        for name in ("stages", "training"):
            known[name] = tuple(known.get(name, ()))
        known["start"] = Start(**known["start"])
        return cls(**known)

    def to_json(self) -> str:
        """Return the text of ``record.json``, with a digest of its contents."""
        values = self.to_dict()
        # It depends on times, and is named as they are: who compares records leaves it out as well.
        values[_DIGEST] = {"seconds": digest_of(values)}
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunRecord":
        """Return the record whose ``record.json`` this is.

        Raises:
            ValueError: it is not JSON, or not as it was written; those of older versions have no
                digest.
            TypeError, KeyError: it is of something else.
        """
        values = parse_json(text)
        if not isinstance(values, dict):
            raise ValueError("it holds no fields")
        digest = values.pop(_DIGEST, None)
        if digest is not None and digest != {"seconds": digest_of(values)}:
            raise ValueError(
                "its contents are not those that were written; "
                f"where they were changed on purpose, take its {_DIGEST!r} out"
            )
        return cls.from_dict(values)

    def to_log(self) -> str:
        """Return the text of ``log.txt``: the published table, and comment lines around it."""
        pruned_at = None if self.after_pruning is None else self.after_pruning.epoch
        lines = [f"# {name}={value}" for name, value in self.config.items()]
        lines += [f"# start weights sha256 {self.start.weights_sha256}"]
        pruning = [f"# {line}" for line in self._pruning_lines()]
        lines += pruning if not self.epochs or pruned_at == 0 else []
        lines += [*(f"# {line}" for line in _LOG_COMMENT), LOG_HEADER]
        for row in self.epochs:
            lines.append(_log_line(row))
            lines += pruning if self._log_pruning_after(row.epoch, pruned_at) else []
        if self.status != RUNNING:
            lines.append(f"# {self.status}" + (f": {self.message}" if self.message else ""))
            if self.best is not None:
                best = _epoch_and_row(self.best.epoch)
                lines.append(f"# best {best}: {describe(self.best.scores)}")
        return "\n".join(lines) + "\n"

    def _log_pruning_after(self, epoch: int, pruned_at: int | None) -> bool:
        at = self.epochs[-1].epoch if pruned_at is None else pruned_at
        return at > 0 and epoch == at

    def _pruning_lines(self) -> list[str]:
        lines = []
        if self.before_pruning is not None:
            lines.append(f"before pruning: {describe(self.before_pruning.scores)}")
        lines += [describe_stage(stage, self.config["pi"]) for stage in self.stages]
        if self.after_pruning is not None:
            lines.append(f"after pruning: {describe(self.after_pruning.scores)}")
            lines.append(f"removed {self.removed} of {self.prunable}: sparsity {self.sparsity:.7f}")
        lines += [
            f"training from {_epoch_and_row(it['from_epoch'])}: {it['mode']}, {it['reason']}"
            for it in self.training
        ]
        return lines


def describe(scores: Scores) -> str:
    """Return the six scores in one line, named as the columns of the log."""
    names = LOG_HEADER.split("\t")[1:-1]
    values = asdict(scores).values()
    return " ".join(f"{name} {value:.5f}" for name, value in zip(names, values, strict=True))


def describe_stage(stage: Mapping[str, Any], stages: int) -> str:
    """Return what happened in one pruning stage, in one line and without its time."""
    predicted = stage["predicted_change"]
    return (
        f"stage {stage['stage']}/{stages}: sparsity {stage['sparsity']:.5f} "
        f"loss {_number(stage['loss_before'])} -> {_number(stage['loss_after'])} "
        f"predicted change {'none' if predicted is None else format(predicted, '.5f')}"
    )


def legible(text: str) -> str:
    r"""Return a line of somebody's text as any terminal, file and library takes it.

    Control characters and halves of characters become question marks, and a long line is cut.

    >>> legible("red: \x1b[31m")
    'red: ?[31m'
    """
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return "".join(sign if sign.isprintable() else "?" for sign in cut)


def _number(value: float | None) -> str:
    """JSON has no NaN: a loss that was not finite is null there."""
    return "nan" if value is None else format(value, ".5f")


def summarise(record: RunRecord) -> str:
    """Return what came of a run, in a few lines."""
    lines = [f"{record.status} in {record.seconds:.1f} s"]
    if record.before_pruning is not None and record.after_pruning is not None:
        before, after = record.before_pruning.scores, record.after_pruning.scores
        lines.append(
            f"pruned {record.removed:,} of {record.prunable:,} weights "
            f"(sparsity {record.sparsity:.5f}): training loss {before.train_loss:.4f} -> "
            f"{after.train_loss:.4f}, test error {before.test_error:.2%} -> {after.test_error:.2%}"
        )
    if record.best is not None:
        best = record.best.scores
        lines.append(
            f"best epoch {record.best.epoch}: training loss {best.train_loss:.4f}, "
            f"validation error {best.valid_error:.2%}, test error {best.test_error:.2%}"
        )
    return "\n".join(lines)


def _log_line(row: EpochRecord) -> str:
    scores = (f"{value:.5f}" for value in vars(row.scores).values())
    return "\t".join([str(row.epoch - 1), *scores, f"{row.seconds:.2f}"])


def _epoch_and_row(epoch: int) -> str:
    """Name an epoch in the log; epoch 0, before all training, has no row there."""
    return f"epoch {epoch} (n {epoch - 1})" if epoch else "epoch 0"


def _epoch(values: Mapping[str, Any] | None) -> Any:
    if values is None:
        return None
    scores = {
        name: math.nan if value is None else value for name, value in values["scores"].items()
    }
    return EpochRecord(values["epoch"], Scores(**scores), values["seconds"])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (Scores, EpochRecord, Start)):
        return _plain(vars(value))  # not asdict, which copies deeply: a record has many epochs
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
