"""What is known of a run: its record, and the text of ``record.json``.

No torch here, so that thousands of records can be read in a moment.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from lossprune.experiment.pruning_flags import stages_in_all
from lossprune.json_text import digest_of, parse_json

_DIGEST = "sha256"


class RunStatus(StrEnum):
    """How a run stands, as its record says."""

    RUNNING = "running"
    FINISHED = "finished"
    DIVERGED = "diverged"


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
        removed: how many of its weights were removed already, and stay so.
    """

    path: str | None
    sha256: str | None
    weights_sha256: str
    removed: int = 0


@dataclass(frozen=True)
class RunRecord:
    """One run, from its settings to its results.

    Attributes:
        config: what determines the result, by flag.
        environment: versions, device, machine, threads of each process, processes.
        start: the network it began from.
        status: a :class:`RunStatus`; one that was read may be any text.
        message: why it diverged, or None.
        before_pruning: the network about to be pruned, at the epoch it comes from.
        after_pruning: the same network with the mask applied, at the epoch of pruning.
        best: the network in ``best_model.pt``: lowest validation error, of the pruned ones if any.
        last: the network in ``last_model.pt``.
        stages: one dictionary per pruning stage, as
            :func:`lossprune.experiment.stage_dict.stage_dict` makes it.
        removed: weights removed.
        prunable: prunable weights in all.
        epochs: one record per epoch trained.
        training: how the pruned network was trained, and one before pruning by several processes
            or together with others: dictionaries of ``from_epoch``, ``mode`` (``"dense"``,
            ``"compacted"``, ``"sparse"``, ``"stacked"`` or ``"distributed"``) and ``reason``;
            usually one.
        seconds: of computing, over all attempts that ended in a whole epoch or stage.
        own: of code and data of the user's own, SHA-256 of the files of modules, by flag, and
            of the examples as they were loaded, by ``data``.
    """

    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    start: Start
    status: str = RunStatus.RUNNING
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
    own: Mapping[str, str] = field(default_factory=dict)
    format: str = field(default="lossprune record 1")

    def __repr__(self) -> str:
        parts = [
            self.status,
            f"{self.removed:,} of {self.prunable:,} weights removed",
            f"{len(self.epochs)} epochs",
        ]
        if self.best is not None:
            parts.append(f"test error {self.best.scores.test_error:.4g} at best")
        return f"RunRecord({', '.join(parts)})"

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that is removed."""
        return self.removed / self.prunable if self.prunable else 0.0

    @property
    def stages_in_all(self) -> int | None:
        """How many stages its pruning has, with those at the final mask; None: it finds that."""
        config = self.config
        ends = config.get("pr", 0.0) is not None or "multiply_adds" in config
        return stages_in_all(config["pi"], config.get("finish", 0), ends=ends)

    @property
    def is_pruning(self) -> bool:
        """Whether its network is that which is being pruned."""
        return self.before_pruning is not None and self.after_pruning is None

    @property
    def is_just_pruned(self) -> bool:
        """Whether its network has not been trained since it was pruned."""
        return self.after_pruning is not None and self.after_pruning.epoch == len(self.epochs)

    @property
    def ends_best(self) -> bool:
        """Whether its network is that of the best epoch so far."""
        best, last = self.best, self.last
        return best is not None and last is not None and best.epoch == last.epoch

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
            status=RunStatus.FINISHED,
            message=None,
            best=min(candidates, key=lambda row: row.scores.valid_error),  # the first of equals
            last=candidates[-1],
            epochs=rows,
            training=tuple(way for way in self.training if way["from_epoch"] <= epochs),
            seconds=self.seconds - sum(row.seconds for row in later),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return dictionaries, lists, numbers and strings; what is not finite becomes None."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**_plain(values), "status": str(self.status), "sparsity": self.sparsity}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunRecord":
        """Return the record that :meth:`to_dict` described."""
        known = {name: value for name, value in values.items() if name not in ("sparsity", _DIGEST)}
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
