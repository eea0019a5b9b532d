"""Records of runs, read, checked and laid out as one table.

A run is read once and kept small: one row of settings and scores, and its stages and epochs as
arrays.  A record that cannot be used is left out, and the report says which and why.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossprune.experiment.log import legible
from lossprune.experiment.record import (
    EpochRecord,
    RunRecord,
    RunStatus,
    Scores,
)
from lossprune.experiment.stage_dict import predicted_change
from lossprune.flags import AUTO
from lossprune.report.found import found_of, points_of, regs_of
from lossprune.report.layout import arrange
from lossprune.report.records_file import RecordsFile
from lossprune.report.settings import (
    ASKED,
    BUDGETS,
    FOUND,
    MAY_BE_FOUND,
    OPTIONAL,
    RECORDED,
    SETTINGS,
    unasked,
)
from lossprune.report.source import ResultsFolder

_SCORES = tuple(item.name for item in fields(Scores))
_LONGEST_SETTING = 80
MOMENTS = {"before_pruning": "before", "after_pruning": "pruned", "best": "best", "last": "last"}

_NEEDED = [name for name, flag in SETTINGS.items() if flag.named == "always" or name == "dataset"]

RunSource = ResultsFolder | RecordsFile
"""Runs by their folders; ``folder`` is where their own files are, None where they are not there."""

STAGE_COLUMNS = ("sparsity", "predicted_change", "realised_change")
REG_COLUMNS = ("sparsity", "chosen")
POINT_COLUMNS = ("sparsity", "loss", "error", "reached")
EPOCH_COLUMNS = ("epoch", *_SCORES)


@dataclass(frozen=True)
class History:
    """What happened in a run on the way.

    Attributes:
        stages: one row per pruning stage: sparsity, predicted and realised change of the loss.
        epochs: one row per epoch: its number, then the six scores.
        regs: one row per stage that chose its λ: the sparsity that it began with, and λ.
        points: one row per mask that was judged on validation data: sparsity, loss, error, and
            whether it is what the run came to.
    """

    stages: NDArray[np.float32]
    epochs: NDArray[np.float32]
    regs: NDArray[np.float32]
    points: NDArray[np.float32]


@dataclass(frozen=True)
class LeftOut:
    """A record that could not be used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Results:
    """All runs of a folder of results, or of a file of their records.

    Attributes:
        source: where they come from.
        runs: one row per run, by the columns that :func:`lossprune.report.layout.arrange` names.
        histories: by the row's index.
        left_out: records that could not be used.
    """

    source: RunSource
    runs: pd.DataFrame
    histories: list[History]
    left_out: tuple[LeftOut, ...]

    def __repr__(self) -> str:
        return f"Results({len(self.runs):,} runs, {len(self.left_out):,} records left out)"


def read_results(path: Path, epochs: int | None = None) -> Results:
    """Read a folder's records, however deep (it may be one run's own), or a file of records.

    Args:
        path: of either.
        epochs: take longer pruned runs as if they had ended after so many; None: as they are.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it holds no record, or none that can be used.
    """
    source = source_of(path)
    rows, histories, left_out = [], [], []
    for where, read in source.read(partial(_row_and_history, epochs=epochs)):
        if isinstance(read, str):
            left_out.append(LeftOut(where, read))
        else:
            row, history = read
            rows.append({"folder": where, **row})
            histories.append(history)
    if not rows:
        first = left_out[0].reason if left_out else "there is none"
        raise ValueError(f"none of the {len(left_out)} records in {path} can be used: {first}")
    runs = pd.DataFrame(rows).drop(columns=unasked(rows))
    for name in OPTIONAL & set(runs.columns):  # None, which a column of numbers would turn to NaN
        runs[name] = pd.Series([row[name] for row in rows], dtype=object)
    return Results(source, arrange(runs), histories, tuple(left_out))


def source_of(path: Path) -> RunSource:
    """Return the records of a folder or a file; errors as :func:`read_results`."""
    if path.is_dir():
        return ResultsFolder(path)
    if path.is_file():
        return RecordsFile(path)
    raise FileNotFoundError(f"no folder of results at {path}, nor a file of records")


def _row_and_history(record: RunRecord, epochs: int | None) -> tuple[dict[str, Any], History]:
    if epochs is not None:
        record = record.until(epochs)
    return row_of(record), _history(record)


def row_of(record: RunRecord) -> dict[str, Any]:
    """Return settings and scores as one flat row, settings by their names in the code.

    Raises:
        ValueError: a setting is missing or of the wrong type.
    """
    row = _settings(record.config)
    if record.status not in list(RunStatus):
        raise ValueError(f"the record's status is {_quoted(record.status)}")
    row["start"] = legible(record.start.path or "")
    row["start_weights"] = legible(record.start.weights_sha256)
    row["status"], row["message"] = record.status, legible(record.message or "")
    row["pruned"] = record.after_pruning is not None
    row["removed"], row["prunable"] = record.removed, record.prunable
    row["achieved_sparsity"] = record.sparsity
    row["seconds"] = record.seconds
    row["trained_epochs"] = len(record.epochs)
    for moment, prefix in MOMENTS.items():
        row.update(_scores(getattr(record, moment), prefix))
    row["best_epoch"] = record.best.epoch if record.best else np.nan
    row["loss_change"] = row["pruned_train_loss"] - row["before_train_loss"]
    row["error_gap"] = row["best_test_error"] - row["before_test_error"]
    device = record.environment.get("device_name", record.environment.get("device", ""))
    row |= found_of(record)
    row["device"] = legible(str(device))
    row["torch"] = legible(str(record.environment.get("torch", "")))
    return row


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise ValueError(f"the record has no setting {', '.join(missing)}")
    for name, value in config.items():
        # It becomes a heading, part of a file's name and a word of a command.
        for text in (name, value) if isinstance(value, str) else (name,):
            if len(text) > _LONGEST_SETTING or not text.isprintable():
                raise ValueError(f"the record's setting {_quoted(name)} is {_quoted(value)}")
    for name in [*_NEEDED, *(name for name in ASKED if name in config)]:
        if not _fits(name, config[name]):
            raise ValueError(f"the record's setting {name} is {_quoted(config[name])}")
    row = {flag.field: config.get(name, flag.default) for name, flag in SETTINGS.items()}
    row |= {name: FOUND for name in MAY_BE_FOUND if row[name] == AUTO}
    if any(row[name] is not None for name in BUDGETS):
        row |= {} if row["sparsity"] is None else {"most_removed": row["sparsity"]}
        row["sparsity"] = None
    if row["sparsity"] is None:
        row["sparsity"] = np.nan
    row |= {name: value for name, value in config.items() if name not in SETTINGS}
    row["has_start"] = row.pop("start") is not None
    return row


def _fits(setting: str, value: object) -> bool:
    kind, kinds = RECORDED[setting], SETTINGS[setting].kinds
    if kind in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        found = (value == AUTO and str in kinds) or (value is None and NoneType in kinds)
        return number or found
    return isinstance(value, kind) or (kind is bool and setting == "model_0" and value is None)


def _quoted(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _LONGEST_SETTING else f"{text[:_LONGEST_SETTING]}…"


def _scores(moment: EpochRecord | None, prefix: str) -> dict[str, float]:
    values = dict.fromkeys(_SCORES, np.nan) if moment is None else asdict(moment.scores)
    return {f"{prefix}_{name}": float(value) for name, value in values.items()}


def _history(record: RunRecord) -> History:
    changes = [{**stage, "predicted_change": predicted_change(stage)} for stage in record.stages]
    stages = [[_number(stage[name]) for name in STAGE_COLUMNS] for stage in changes]
    epochs = [
        [row.epoch, *(getattr(row.scores, name) for name in _SCORES)] for row in record.epochs
    ]
    return History(
        _array(stages, STAGE_COLUMNS),
        _array(epochs, EPOCH_COLUMNS),
        _array(regs_of(record), REG_COLUMNS),
        _array([[_number(value) for value in point] for point in points_of(record)], POINT_COLUMNS),
    )


def _array(rows: list[list[float]], columns: tuple[str, ...]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32).reshape(-1, len(columns))


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)
