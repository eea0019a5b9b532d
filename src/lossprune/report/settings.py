"""What a report knows of the settings of a run, from the flags of ``lossprune run``."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from lossprune.experiment.config import RunConfig, implied_dataset
from lossprune.flags import AUTO, declared_flags, words_of

_FLAGS = declared_flags(RunConfig)

SETTINGS = {name: flag for name, flag in _FLAGS.items() if flag.named != "never"}
"""The flags whose values a record holds, by name."""

ASKED = {name: flag for name, flag in SETTINGS.items() if flag.named == "asked"}
"""Those of them that a record holds only where they are not the default."""

RECORDED = {name: bool if Path in flag.kinds else flag.kinds[0] for name, flag in SETTINGS.items()}
"""The type of each in a record; of the start network it says only whether there is one."""

FLAG_OF = {flag.field: name for name, flag in _FLAGS.items()}
"""The name of each flag by what the code calls it, which is the column of a table of runs."""

DEFAULTS = {name: flag.default for name, flag in _FLAGS.items()}


FOUND = -1
"""What stands in a table of runs for a λ or π that is found on the way: it sorts before all others.

In the place of a sparsity that a budget or a share of the multiply-adds finds stands NaN."""

MAY_BE_FOUND = ("reg", "stages")
"""The columns in which it may stand."""

BUDGETS = ("max_loss_increase", "max_error_increase")
"""The columns of what a pruning may cost; None where there is no limit."""


OPTIONAL = {flag.field for flag in ASKED.values() if NoneType in flag.kinds}
"""The columns of numbers that may be None: not asked for."""


_FIRST_ASKED = ("compensate", "finish", "recalibrate")  # columns that every table of runs has


def unasked(rows: list[dict[str, Any]]) -> list[str]:
    """Return the columns of later flags that none of the rows asks for."""
    later = [flag for flag in ASKED.values() if flag.field not in _FIRST_ASKED]
    return [flag.field for flag in later if all(row[flag.field] == flag.default for row in rows)]


def command_of(row: Mapping[str, Any], path: str) -> str:
    """Return the ``lossprune run`` command of a row of :class:`lossprune.report.Results`.

    Only flags that differ from their defaults are given.

    Args:
        row: settings by their names in the code, but for the criterion, which is ``pm`` there.
        path: the results folder.
    """
    values = {flag.field: row.get(flag.field, flag.default) for flag in SETTINGS.values()}
    values |= {"criterion": row["pm"], "start": row.get("start") or None, "path": Path(path)}
    values |= {name: AUTO for name in MAY_BE_FOUND if values[name] == FOUND}
    if math.isnan(values["sparsity"]):
        most = row.get("most_removed", math.nan)
        values["sparsity"] = None if math.isnan(most) else most
    if values["dataset"] == implied_dataset(row["arch"]):
        values["dataset"] = None
    return shlex.join(["lossprune", "run", *words_of(RunConfig, values)])
