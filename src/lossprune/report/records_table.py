"""Records of runs as an Arrow table, a row a run, and back.

Numbers are as in ``record.json``, but for the losses and seconds of epochs, which are most of a
file: these are in single precision, and come back as the shortest decimals that it tells apart.
What a record says of settings and environment beyond the columns known here is kept as JSON.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lossprune.experiment.record import EpochRecord, RunRecord, Scores
from lossprune.json_text import parse_json
from lossprune.report.settings import ASKED, RECORDED

_ARROW: dict[type, pa.DataType] = {
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
}
_SCORES = tuple(item.name for item in fields(Scores))
LOSSES = tuple(name for name in _SCORES if name.endswith("loss"))
ERRORS = tuple(name for name in _SCORES if name.endswith("error"))
_STEP = "compensation"
_FOUND = ("reg", "rung", "tried", "taken_back", "points", "cost")  # of a stage, where it found them
_MOMENTS = ("before_pruning", "after_pruning", "best", "last")


# Flags that a record names only where they are asked for are among the rest.
_CONFIG = {name: RECORDED[name] for name in sorted(RECORDED.keys() - ASKED.keys())}
_ENVIRONMENT: dict[str, type] = {
    **dict.fromkeys(("lossprune", "torch", "numpy", "python", "platform"), str),
    **dict.fromkeys(("device", "device_name"), str),
    **dict.fromkeys(("cpus", "threads", "processes"), int),
}
_STAGE: dict[str, type] = {
    **{"stage": int, "sparsity": float, "removed": int},
    **dict.fromkeys(("loss_before", "loss_after", "predicted_change", "realised_change"), float),
    "seconds": float,
}


def _struct(kinds: Mapping[str, type]) -> pa.DataType:
    return pa.struct([(name, _ARROW[kind]) for name, kind in kinds.items()])


_MOMENT = _struct({"epoch": int, **dict.fromkeys(_SCORES, float), "seconds": float})
_EPOCH = pa.struct(
    [
        ("epoch", pa.int32()),
        *((name, pa.float32() if name in LOSSES else pa.float64()) for name in _SCORES),
        ("seconds", pa.float32()),
    ]
)
_MORE = pa.map_(pa.string(), pa.string())

SCHEMA = pa.schema(
    [
        ("folder", pa.string()),
        ("config", _struct(_CONFIG)),
        ("more_config", _MORE),
        ("environment", _struct(_ENVIRONMENT)),
        ("more_environment", _MORE),
        ("start", _struct({"path": str, "sha256": str, "weights_sha256": str, "removed": int})),
        ("status", pa.string()),
        ("message", pa.string()),
        *((moment, _MOMENT) for moment in _MOMENTS),
        ("stages", pa.list_(_struct(_STAGE))),
        ("removed", pa.int64()),
        ("prunable", pa.int64()),
        ("epochs", pa.list_(_EPOCH)),
        ("training", pa.list_(_struct({"from_epoch": int, "mode": str, "reason": str}))),
        ("seconds", pa.float64()),
        ("format", pa.string()),
        ("layers", pa.list_(_struct({"name": str, "sparsity": float}))),
        ("compensations", pa.list_(pa.string())),
        ("found", pa.list_(pa.string())),
    ]
)
"""The columns: ``folder``, then those of ``record.json``, the sparsity of each layer, and, as JSON,
what the compensation of each stage says and what each stage found, where a run has any."""
LATER = ("compensations", "found")
"""Columns that files of earlier versions lack."""


class StoredRun(NamedTuple):
    """A run of a results folder: where in it, its record, and its mask's layers if it has one."""

    folder: str
    record: RunRecord
    layers: Mapping[str, float] | None


def to_table(runs: Sequence[StoredRun]) -> pa.Table:
    """Return the runs as a table of ``SCHEMA``.

    Raises:
        pyarrow.ArrowException, TypeError, KeyError, AttributeError: a value that its column
            cannot hold.
    """
    apart = SCHEMA.get_field_index("epochs")
    rows = pa.Table.from_pylist([_row(run) for run in runs], schema=SCHEMA.remove(apart))
    epochs = _epoch_lists([run.record.epochs for run in runs])
    return rows.add_column(apart, SCHEMA.field("epochs"), epochs)


def _row(run: StoredRun) -> dict[str, Any]:
    record = run.record
    config, more_config = _divided(record.config, _CONFIG)
    environment, more_environment = _divided(record.environment, _ENVIRONMENT)
    layers = run.layers
    return {
        "folder": run.folder,
        **{"config": config, "more_config": more_config},
        **{"environment": environment, "more_environment": more_environment},
        "start": asdict(record.start),
        **{"status": record.status, "message": record.message},
        **{moment: _moment(getattr(record, moment)) for moment in _MOMENTS},
        **_stages(record.stages),
        **{"removed": record.removed, "prunable": record.prunable},
        "training": [dict(way) for way in record.training],
        **{"seconds": record.seconds, "format": record.format},
        "layers": layers and [{"name": name, "sparsity": of} for name, of in layers.items()],
    }


def _stages(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [stage.get(_STEP) for stage in stages]
    found = [{name: stage[name] for name in _FOUND if name in stage} for stage in stages]
    apart = (_STEP, *_FOUND)
    return {
        "stages": [
            {key: value for key, value in row.items() if key not in apart} for row in stages
        ],
        "compensations": [step and json.dumps(step) for step in steps] if any(steps) else None,
        "found": [json.dumps(each) for each in found] if any(found) else None,
    }


def _divided(
    values: Mapping[str, Any], kinds: Mapping[str, type]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return what has a column, and the rest as JSON; None is of the rest: null is no value."""
    known = {name: value for name, value in values.items() if type(value) is kinds.get(name)}
    rest = [(name, json.dumps(value)) for name, value in values.items() if name not in known]
    return known, rest


def _moment(row: EpochRecord | None) -> dict[str, Any] | None:
    if row is None:
        return None
    scores = {
        name: value if math.isfinite(value) else None for name, value in asdict(row.scores).items()
    }
    return {"epoch": row.epoch, **scores, "seconds": row.seconds}


def _epoch_lists(epochs: Sequence[Sequence[EpochRecord]]) -> pa.Array:
    rows = [row for of_one in epochs for row in of_one]
    columns: list[list[Any]] = [[row.epoch for row in rows]]
    columns += [[getattr(row.scores, name) for row in rows] for name in _SCORES]
    columns += [[row.seconds for row in rows]]
    arrays = [
        pa.array(values, type=field.type, from_pandas=True)  # from_pandas: NaN is null
        for field, values in zip(_EPOCH, columns, strict=True)
    ]
    offsets = np.cumsum([0, *map(len, epochs)], dtype=np.int32)
    structs = pa.StructArray.from_arrays(arrays, fields=list(_EPOCH))
    return pa.ListArray.from_arrays(pa.array(offsets), structs)


def from_table(table: pa.Table) -> Iterator[StoredRun]:
    """Give the runs of a table of ``SCHEMA``.

    Raises:
        TypeError, KeyError, ValueError, AttributeError: a row that is not of a run.
    """
    rows = table.drop_columns(["epochs"]).to_pylist()
    for row, epochs in zip(rows, _lists_of_epochs(table["epochs"]), strict=True):
        folder, layers = row.pop("folder"), row.pop("layers")
        config = _joined(row["config"], row.pop("more_config"))
        row["config"] = dict(sorted(config.items()))  # as RunConfig.settings are
        row["environment"] = _joined(row["environment"], row.pop("more_environment"))
        for moment in _MOMENTS:
            row[moment] = _nested(row[moment])
        for stage, step in zip(row["stages"], row.pop("compensations", None) or (), strict=False):
            if step is not None:
                stage[_STEP] = parse_json(step)
        for stage, found in zip(row["stages"], row.pop("found", None) or (), strict=False):
            stage.update(parse_json(found))
        record = RunRecord.from_dict({**row, "epochs": ()})
        # Not from_dict: of epochs there are thousands.
        record = RunRecord(**{**vars(record), "epochs": epochs})
        yield StoredRun(folder, record, layers_of(layers))


def layers_of(cell: Sequence[Mapping[str, Any]] | None) -> dict[str, float] | None:
    """Return the sparsity of each layer as a cell of the column ``layers`` says it, if it does."""
    return None if cell is None else {layer["name"]: layer["sparsity"] for layer in cell}


def _joined(known: Mapping[str, Any], more: Sequence[tuple[str, str]]) -> dict[str, Any]:
    values = {name: value for name, value in known.items() if value is not None}
    return values | {name: parse_json(text) for name, text in more}


def _nested(moment: dict[str, Any] | None) -> dict[str, Any] | None:
    if moment is None:
        return None
    scores = {name: moment[name] for name in _SCORES}
    return {"epoch": moment["epoch"], "scores": scores, "seconds": moment["seconds"]}


def _lists_of_epochs(column: pa.ChunkedArray) -> Iterator[tuple[EpochRecord, ...]]:
    lists = column.combine_chunks()
    columns = [_values(lists.flatten().field(name)) for name in ("epoch", *_SCORES, "seconds")]
    rows = [
        EpochRecord(epoch, Scores(*scores), seconds)
        for epoch, *scores, seconds in zip(*columns, strict=True)
    ]
    first = 0
    for length in lists.value_lengths().to_pylist():
        yield tuple(rows[first : first + length])
        first += length


def _values(array: pa.Array) -> list[Any]:
    """Return numbers of Python, null as NaN; of single ones the shortest decimals."""
    if array.type == pa.float32():
        array = array.cast(pa.string()).cast(pa.float64())
    return array.to_numpy(zero_copy_only=False).tolist()
