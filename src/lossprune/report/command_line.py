"""The command that makes a run again."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lossprune.experiment.config import RunConfig, implied_dataset


def command_of(row: Mapping[str, Any], path: str) -> str:
    """Return the ``lossprune run`` command of a row of :class:`lossprune.report.Results`.

    Only flags that differ from their defaults are given.

    Args:
        row: settings by their names in the code.
        path: the results folder.
    """
    words = ["lossprune", "run"]
    implied = implied_dataset(row["arch"])
    for item in fields(RunConfig):
        flag, value = item.metadata["flag"], row.get(item.name)
        if item.name == "path":
            value = path
        elif item.name == "start":
            value = value or None
        elif item.name == "dataset" and value == implied:
            continue
        if item.metadata["named"] == "never" and item.name != "path":
            continue
        if value is None or str(value) == str(item.default):
            continue
        words += [f"--{flag}"] if item.default is False else [f"--{flag}", str(value)]
    return shlex.join(words)
