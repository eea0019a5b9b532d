"""The tables of dense networks that were pruned to several sparsities: loss and error by sparsity.

Where every network was pruned to one sparsity there are none.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from lossprune.report import series
from lossprune.report.estimates import estimate
from lossprune.report.table import (
    SPREAD,
    Column,
    Table,
    frame_of,
    measures,
    note_of,
    ordered,
)

_RIGHT_AFTER = "0 epochs"
_RULE = (
    "At each sparsity λ is the one with the lowest mean validation loss right after pruning there, "
    "over seeds, of so many as the column “of λ” says: those measured on the most seeds. Test data "
    "take no part in it. Dense is the mean of the networks before pruning."
)
_METHOD_COLUMNS = (
    Column("criterion", "criterion"),
    Column("stages", "π", "stages"),
    Column("schedule", "schedule"),
)
_SPARSITY_COLUMNS = (
    Column("sparsity", "removed", "share"),
    Column("kept", "kept", "share"),
    Column("reg", "λ", "reg"),
    Column("among", "of λ", "count"),
)


def sparsity_tables(runs: pd.DataFrame) -> tuple[Table, ...]:
    """Return the training loss right after pruning, and the test error, by sparsity."""
    data = series.by_sparsity(runs)
    return (_loss_table(data), _error_table(data)) if len(data) else ()


def _loss_table(data: pd.DataFrame) -> Table:
    columns = (
        *_METHOD_COLUMNS,
        *_SPARSITY_COLUMNS,
        *measures("loss mean", "number"),
        Column("dense", "dense", "number"),
    )
    rows = list(_rows(data[data["measure"] == series.LOSS], (0, np.inf)))
    frame = ordered(frame_of(rows, columns))
    caption = f"Training loss right after pruning, on the whole training split. {_RULE} {SPREAD}"
    title = "Loss right after pruning against sparsity"
    return Table("loss-against-sparsity", title, caption + note_of(frame), columns, frame, True)


def _error_table(data: pd.DataFrame) -> Table:
    n, *others = measures("test error mean", "percent")
    columns = (
        *_METHOD_COLUMNS,
        Column("tuning", "fine-tuning"),
        *_SPARSITY_COLUMNS,
        n,
        Column("unfinished", "unfinished", "count"),
        *others,
        Column("dense", "dense", "percent"),
    )
    rows = list(_rows(data[data["measure"] != series.LOSS], (0, 1)))
    frame = ordered(frame_of(rows, columns))
    caption = (
        f"Test error right after pruning ({_RIGHT_AFTER}), and after fine-tuning of "
        f"the network with the lowest validation error on the way, of finished runs. {_RULE} "
        f"{SPREAD}"
    )
    title = "Error against sparsity"
    return Table("error-against-sparsity", title, caption + note_of(frame), columns, frame, True)


def _rows(data: pd.DataFrame, within: tuple[float, float]) -> Iterator[dict[str, Any]]:
    keys = [*series.METHOD_KEYS, "tuning", "sparsity", "reg", "among"]
    for key, part in data.groupby(keys):
        named: dict[str, Any] = dict(zip(keys, key, strict=True))
        yield {
            **named,
            "tuning": named["tuning"] or _RIGHT_AFTER,
            "kept": 1 - named["sparsity"],
            **asdict(estimate(part["value"], within)),
            "unfinished": int(part["unfinished"].sum()),
            "diverged": int(part["diverged"].sum()),
            "dense": estimate(part["dense_value"]).mean,
        }
