"""The report's tables: pure functions from runs to a frame of numbers, described column by column.

Everything is taken over seeds: n, mean, standard deviation (n − 1) and 95 % t-interval.
"""

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
from lossprune.report.found_table import found_tables
from lossprune.report.layout import METHOD, criterion_order
from lossprune.report.series import correlations
from lossprune.report.sparsity_tables import sparsity_tables
from lossprune.report.table import (
    RULE,
    SPREAD,
    Column,
    Table,
    frame_of,
    measures,
    note_of,
    ordered,
    stages_text,
)

_Chosen = tuple[dict[str, Any], pd.Series]


def all_tables(runs: pd.DataFrame) -> tuple[Table, ...]:
    """Return every table of the report."""
    return (
        pruning_table(runs),
        tuning_table(runs),
        difference_table(runs),
        correlation_table(runs),
        *sparsity_tables(runs),
        *found_tables(runs),
    )


_METHOD_COLUMNS = (
    Column("criterion", "criterion"),
    Column("stages", "π", "stages"),
    Column("schedule", "schedule"),
    Column("choice", "choice of λ"),
    Column("reg", "λ", "reg"),
)


def pruning_table(runs: pd.DataFrame) -> Table:
    """Return the change of the training loss by pruning, at the best λ and at λ = 0."""
    pruned = pruned_runs(runs)
    rows = []
    for key, chosen in at_choices(pruned, choices_of(runs)):
        after = estimate(chosen["pruned_train_loss"]).mean
        rows.append({**key, **_summary(chosen, "loss_change"), "loss_after": after})
    columns = (
        *_METHOD_COLUMNS,
        *measures("ΔL mean", "change"),
        Column("loss_after", "loss after", "number"),
    )
    caption = (
        "Training loss after pruning minus before it, right after pruning and before any "
        f"fine-tuning, both on the whole training split. {RULE} {SPREAD}"
    )
    frame = ordered(frame_of(rows, columns))
    title = "Loss change by pruning"
    return Table("loss-change", title, caption + note_of(frame), columns, frame)


def tuning_table(runs: pd.DataFrame) -> Table:
    """Return the test error after fine-tuning, at the λ of the loss table and the best by error."""
    after = [
        {**key, "tuning": tuning, **_tuned_summary(chosen)}
        for tuning, key, chosen in tuned_choices(runs)
    ]
    n, *others = measures("test error mean", "percent")
    columns = (
        *_METHOD_COLUMNS[:3],
        Column("tuning", "fine-tuning"),
        *_METHOD_COLUMNS[3:],
        n,
        Column("unfinished", "unfinished", "count"),
        *others,
        Column("gap", "gap", "points"),
    )
    caption = (
        "Test error of the network with the lowest validation error while fine-tuning, of finished "
        f"runs. {RULE} “{BEST_TUNED}” is the λ with the lowest mean validation error after "
        "fine-tuning, among those λ fine-tuned on the most seeds. The gap is the mean test error "
        f"minus that of the network before pruning. {SPREAD}"
    )
    frame = ordered(frame_of(after, columns))
    title = "Error after fine-tuning"
    return Table("error-after-fine-tuning", title, caption + note_of(frame), columns, frame)


def correlation_table(runs: pd.DataFrame) -> Table:
    """Return Spearman's ρ of loss change and error gap: all fine-tuned runs, and by stages."""
    among = {
        "all runs": runs,
        "π = 1": runs[runs["stages"] == 1],
        "π > 1": runs[runs["stages"] != 1],
    }
    rows = [
        {"network": network, "tuning": tuning, "among": name, **asdict(found)}
        for name, part in among.items()
        for (network, tuning), found in correlations(part).items()
    ]
    columns = (
        Column("tuning", "fine-tuning"),
        Column("among", "among"),
        Column("n", "runs", "count"),
        Column("rho", "ρ", "change"),
        Column("low", "95 % from", "change"),
        Column("high", "to", "change"),
    )
    return Table(
        "rank-correlation",
        "Loss change against error after fine-tuning",
        "Spearman’s ρ of the loss change by pruning and the gap in test error after fine-tuning, "
        "over all fine-tuned runs of a network, whatever their criterion, π, λ and seed, and over "
        "those pruned in one stage and in several. The interval is the 95 % percentile bootstrap "
        "over runs; runs of one seed start from the same network, so it is rather narrow.",
        columns,
        frame_of(rows, columns).sort_values(["network", "tuning"], kind="stable"),
    )


def _summary(chosen: pd.DataFrame, column: str) -> dict[str, Any]:
    values = chosen[column]
    return {**asdict(estimate(values)), "diverged": int((~np.isfinite(values)).sum())}


def _tuned_summary(chosen: pd.DataFrame) -> dict[str, Any]:
    finished = chosen[chosen["tuned"]]
    return {
        **asdict(estimate(finished["best_test_error"], within=(0, 1))),
        "unfinished": int((chosen["status"] == "running").sum()),
        "diverged": int(chosen["diverged"].sum()),
        "gap": estimate(finished["error_gap"]).mean,
    }


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
                rows.append(
                    {
                        **{"network": network, "measure": measure, "tuning": tuning},
                        "choice": "" if among == "λ" else first["choice"],
                        "between": among,
                        **{"first": _label(first, among), "second": _label(second, among)},
                        **asdict(estimate((left - right).dropna())),
                    }
                )
    columns = (
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
    )
    caption = (
        "First minus second, seed by seed, over the seeds that both have: below 0 the first is "
        "better. An interval without 0 is a difference at the 95 % level, with no correction for "
        "the number of comparisons. Loss changes are of the training loss right after pruning, "
        f"errors (in percentage points) on test data after fine-tuning. {RULE}"
    )
    place = ["network", "measure", "tuning", "choice", "between"]
    frame = frame_of(rows, columns).sort_values(place, kind="stable")
    title = "Paired differences"
    return Table("paired-differences", title, caption + note_of(frame), columns, frame)


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
    return f"{key['criterion']} π {stages_text(key['stages'])}{linear}{choice}"
