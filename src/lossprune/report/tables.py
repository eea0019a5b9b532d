"""The report's tables: pure functions from runs to a frame of numbers, described column by column.

Everything is taken over seeds: n, mean, standard deviation (n − 1) and 95 % t-interval.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from lossprune.report.choice import BY_ERROR, best_reg, best_reg_after_pruning, pruned_runs
from lossprune.report.intervals import estimate
from lossprune.report.layout import METHOD, criterion_order, rows_of

BEST, ZERO, BEST_TUNED = "best λ", "λ = 0", "best λ after fine-tuning"
_ESTIMATE = ["n", "mean", "std", "low", "high"]

_RULE = (
    "The best λ of a criterion and π is the one with the lowest mean validation loss right after "
    "pruning, over seeds, among those λ measured on the most seeds; test data take no part in it."
)
_SPREAD = (
    "n counts seeds; std has n − 1 in the denominator; the interval is the 95 % t-interval of the "
    "mean. What is not finite is counted as diverged and left out of the mean."
)


@dataclass(frozen=True)
class Column:
    """A column as it is shown.

    Attributes:
        key: of the frame.
        heading: above it.
        kind: ``text``, ``count``, ``reg`` (a λ), ``change`` (a signed number) or ``percent`` (a
            fraction, shown in percent).
    """

    key: str
    heading: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table to be written in any format.

    Attributes:
        name: of its files.
        title: one line.
        caption: what was measured, over what, and how λ was chosen.
        columns: shown, in order; rows are grouped by ``network``, which is not among them.
        frame: the numbers at full precision.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    frame: pd.DataFrame


def all_tables(runs: pd.DataFrame) -> tuple[Table, ...]:
    """Return every table of the report."""
    return pruning_table(runs), tuning_table(runs), difference_table(runs)


_METHOD_COLUMNS = (
    Column("criterion", "criterion"),
    Column("stages", "π", "count"),
    Column("schedule", "schedule"),
    Column("choice", "choice of λ"),
    Column("reg", "λ", "reg"),
)


def _measures(heading: str, kind: str) -> tuple[Column, ...]:
    return (
        Column("n", "n", "count"),
        Column("diverged", "diverged", "count"),
        Column("mean", heading, kind),
        Column("std", "std", kind.replace("change", "number")),
        Column("low", "95 % from", kind),
        Column("high", "to", kind),
    )


def pruning_table(runs: pd.DataFrame) -> Table:
    """Return the change of the training loss by pruning, at the best λ and at λ = 0."""
    pruned = pruned_runs(runs)
    rows = []
    for key, chosen in _chosen(pruned, _choices(runs)):
        after = estimate(chosen["pruned_train_loss"]).mean
        rows.append({**key, **_summary(chosen, "loss_change"), "loss_after": after})
    keys = ["network", *METHOD, "choice", "reg"]
    columns = [*keys, "n", "diverged", "mean", "std", "low", "high", "loss_after"]
    caption = (
        "Training loss after pruning minus before it, right after pruning and before any "
        f"fine-tuning, both on the whole training split. {_RULE} {_SPREAD}"
    )
    return Table(
        "loss-change",
        "Loss change by pruning",
        caption,
        (
            *_METHOD_COLUMNS,
            *_measures("ΔL mean", "change"),
            Column("loss_after", "loss after", "number"),
        ),
        _ordered(pd.DataFrame(rows, columns=columns)),
    )


def tuning_table(runs: pd.DataFrame) -> Table:
    """Return the test error after fine-tuning, at the λ of the loss table and the best by error."""
    after = [
        {**key, "tuning": tuning, **_tuned_summary(chosen)}
        for tuning, key, chosen in _tuned_choices(runs)
    ]
    keys = ["network", *METHOD, "tuning", "choice", "reg"]
    columns = [*keys, "n", "unfinished", "diverged", "mean", "std", "low", "high", "gap"]
    caption = (
        "Test error of the network with the lowest validation error while fine-tuning, of finished "
        f"runs. {_RULE} “{BEST_TUNED}” is the λ with the lowest mean validation error after "
        "fine-tuning, among those λ fine-tuned on the most seeds. The gap is the mean test error "
        f"minus that of the network before pruning. {_SPREAD}"
    )
    n, *others = _measures("test error mean", "percent")
    return Table(
        "error-after-fine-tuning",
        "Error after fine-tuning",
        caption,
        (
            *_METHOD_COLUMNS[:3],
            Column("tuning", "fine-tuning"),
            *_METHOD_COLUMNS[3:],
            n,
            Column("unfinished", "unfinished", "count"),
            *others,
            Column("gap", "gap", "points"),
        ),
        _ordered(pd.DataFrame(after, columns=columns)),
    )


def difference_table(runs: pd.DataFrame) -> Table:
    """Return differences seed by seed: between criteria, and between numbers of stages."""
    rows: list[dict[str, Any]] = []
    groups = [("loss change", "", *item) for item in _chosen(pruned_runs(runs), _choices(runs))]
    value = {"loss change": "loss_change", "test error": "best_test_error"}
    for tuning, key, chosen in _tuned_choices(runs):
        finished = chosen[chosen["tuned"]]
        groups.append(("test error", tuning, key, finished))
    cells: dict[tuple[str, str, str, str], list[tuple[dict[str, Any], pd.Series]]] = {}
    for measure, tuning, key, chosen in groups:
        by_seed = chosen.set_index("seed")[value[measure]]
        place = (key["network"], measure, tuning, key["choice"])
        cells.setdefault(place, []).append((key, by_seed[np.isfinite(by_seed)]))
    order = criterion_order(runs["criterion"])
    for (network, measure, tuning, choice), methods in cells.items():
        methods.sort(key=lambda method: _place(method[0], order))
        for (second, right), (first, left) in combinations(methods, 2):
            among = _comparison(first, second)
            if among is not None:
                place = {"network": network, "measure": measure, "tuning": tuning, "choice": choice}
                pair = {"between": among, "first": _label(first), "second": _label(second)}
                rows.append({**place, **pair, **asdict(estimate((left - right).dropna()))})
    keys = ["network", "measure", "tuning", "choice", "between", "first", "second"]
    caption = (
        "First minus second, seed by seed, over the seeds that both have: below 0 the first is "
        "better. An interval without 0 is a difference at the 95 % level, with no correction for "
        "the number of comparisons. Loss changes are of the training loss right after pruning, "
        f"errors (in percentage points) on test data after fine-tuning. {_RULE}"
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


def _choices(runs: pd.DataFrame) -> pd.DataFrame:
    """Return network, method, choice and λ: the best by validation loss, and 0."""
    best = best_reg_after_pruning(runs)
    return pd.concat([best.assign(choice=BEST), best.assign(choice=ZERO, reg=0.0)])


def _tuned_choices(runs: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any], pd.DataFrame]]:
    """Give tuning, choice and the runs of it, tuning by tuning; unfinished runs are among them."""
    choices = _choices(runs)
    trains = runs[runs["prunes"] & (runs["epochs"] > runs["prune_epoch"].clip(lower=0))]
    for (network, tuning), group in trains.groupby(["network", "tuning"]):
        tuned = group[group["tuned"]]
        by_error = best_reg(tuned, BY_ERROR, ["network", *METHOD]).assign(choice=BEST_TUNED)
        here = pd.concat([choices[choices["network"] == network], by_error])
        for key, chosen in _chosen(group, here):
            yield str(tuning), key, chosen


def _chosen(
    runs: pd.DataFrame, choices: pd.DataFrame
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Give each choice and the runs at its λ; none, where that λ has not been run."""
    keys = ["network", *METHOD, "reg"]
    groups = dict(iter(runs.groupby(keys)))
    none = runs.iloc[:0]
    for choice in rows_of(choices):
        yield choice, groups.get(tuple(choice[name] for name in keys), none)


def _summary(chosen: pd.DataFrame, column: str) -> dict[str, Any]:
    values = chosen[column]
    return {**asdict(estimate(values)), "diverged": int((~np.isfinite(values)).sum())}


def _tuned_summary(chosen: pd.DataFrame) -> dict[str, Any]:
    finished = chosen[chosen["tuned"]]
    return {
        **asdict(estimate(finished["best_test_error"])),
        "unfinished": int((chosen["status"] == "running").sum()),
        "diverged": int(chosen["diverged"].sum()),
        "gap": estimate(finished["error_gap"]).mean,
    }


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort by network, criterion as the library lists them, π, then as they came."""
    order = {name: place for place, name in enumerate(criterion_order(frame["criterion"]))}
    by = ["network", "criterion", "stages", "schedule", *(["tuning"] if "tuning" in frame else [])]

    def rank(column: pd.Series) -> pd.Series:
        return column.map(order) if column.name == "criterion" else column

    return frame.sort_values(by, key=rank, kind="stable").reset_index(drop=True)


def _comparison(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Criteria are compared at one π, MP (it has but one) with all; stages within a criterion."""
    if first["criterion"] == second["criterion"]:
        return "stages"
    same = (first["stages"], first["schedule"]) == (second["stages"], second["schedule"])
    return "criteria" if same or "MP" in (first["criterion"], second["criterion"]) else None


def _place(key: dict[str, Any], order: list[str]) -> tuple[int, int, str]:
    return order.index(key["criterion"]), key["stages"], key["schedule"]


def _label(key: dict[str, Any]) -> str:
    return f"{key['criterion']} π {key['stages']}" + (
        " linear" if key["schedule"] == "linear" else ""
    )
