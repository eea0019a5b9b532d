"""The table of paired differences: what the same seeds say of two ways to prune."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from lossprune.report.choice import (
    BEST,
    BEST_TUNED,
    ZERO,
    at_choices,
    choices_of,
    pruned_runs,
    tuned_choices,
)
from lossprune.report.estimates import estimate
from lossprune.report.layout import METHOD, criterion_order
from lossprune.report.table import RULE, Column, Table

_ESTIMATE = ["n", "mean", "std", "low", "high"]
_Chosen = tuple[dict[str, Any], pd.Series]


def difference_table(runs: pd.DataFrame) -> Table:
    """Return differences seed by seed: between criteria, between numbers of stages, between λ."""
    rows: list[dict[str, Any]] = []
    cells: dict[tuple[str, str, str], list[_Chosen]] = {}
    for place, method in _by_place(runs):
        cells.setdefault(place, []).append(method)
    order = criterion_order(runs["criterion"])
    for (network, measure, tuning), methods in cells.items():
        methods.sort(key=lambda method: _position(method[0], order))
        for (second, right), (first, left) in combinations(methods, 2):
            among = _comparison(first, second)
            if among is not None:
                place = {"network": network, "measure": measure, "tuning": tuning}
                choice = "" if among == "λ" else first["choice"]
                pair = {"choice": choice, "between": among}
                names = {"first": _label(first, among), "second": _label(second, among)}
                difference = estimate((left - right).dropna())
                rows.append({**place, **pair, **names, **asdict(difference)})
    keys = ["network", "measure", "tuning", "choice", "between", "first", "second"]
    caption = (
        "First minus second, seed by seed, over the seeds that both have: below 0 the first is "
        "better. An interval without 0 is a difference at the 95 % level, with no correction for "
        "the number of comparisons. Loss changes are of the training loss right after pruning, "
        f"errors (in percentage points) on test data after fine-tuning. {RULE}"
    )
    return Table(
        "paired-differences",
        "Paired differences",
        caption,
        (
            Column("measure", "measure"),
            Column("tuning", "fine-tuning"),
            Column("choice", "choice of λ"),
            Column("between", "between"),
            Column("first", "first"),
            Column("second", "second"),
            Column("n", "n", "count"),
            Column("mean", "difference", "difference"),
            Column("std", "std", "difference_std"),
            Column("low", "95 % from", "difference"),
            Column("high", "to", "difference"),
        ),
        pd.DataFrame(rows, columns=[*keys, *_ESTIMATE]).sort_values(keys[:5], kind="stable"),
    )


def _by_place(runs: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], _Chosen]]:
    """Give network, measure and tuning, and what was chosen there with its values by seed."""
    for key, chosen in at_choices(pruned_runs(runs), choices_of(runs)):
        yield (key["network"], "loss change", ""), (key, _by_seed(chosen, "loss_change"))
    for tuning, key, chosen in tuned_choices(runs):
        finished = chosen[chosen["tuned"]]
        yield (key["network"], "test error", tuning), (key, _by_seed(finished, "best_test_error"))


def _by_seed(chosen: pd.DataFrame, column: str) -> pd.Series:
    values = chosen.set_index("seed")[column]
    return values[np.isfinite(values)]


def _comparison(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Criteria are compared at one π, MP (it has but one) with all; stages within a criterion.

    Both at one choice of λ; within a method the best λ is compared with none.
    """
    if all(first[name] == second[name] for name in METHOD):
        choices = first["choice"], second["choice"]
        return "λ" if choices == (BEST, ZERO) and first["reg"] != 0 else None
    if first["choice"] != second["choice"]:
        return None
    if first["criterion"] == second["criterion"]:
        return "stages"
    same = (first["stages"], first["schedule"]) == (second["stages"], second["schedule"])
    return "criteria" if same or "MP" in (first["criterion"], second["criterion"]) else None


def _position(key: dict[str, Any], order: list[str]) -> tuple[int, int, str, int]:
    choice = (ZERO, BEST, BEST_TUNED).index(key["choice"])
    return order.index(key["criterion"]), key["stages"], key["schedule"], choice


def _label(key: dict[str, Any], among: str) -> str:
    linear = " linear" if key["schedule"] == "linear" else ""
    choice = f" {key['choice']}" if among == "λ" else ""
    return f"{key['criterion']} π {key['stages']}{linear}{choice}"
