"""The report's tables: pure functions from runs to a frame of numbers, described column by column.

Everything is taken over seeds: n, mean, standard deviation (n − 1) and 95 % t-interval.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from lossprune.report.choice import (
    BEST_TUNED,
    at_choices,
    choices_of,
    pruned_runs,
    tuned_choices,
)
from lossprune.report.differences import difference_table
from lossprune.report.estimates import estimate
from lossprune.report.layout import METHOD, criterion_order
from lossprune.report.series import correlations
from lossprune.report.table import RULE, SPREAD, Column, Table


def all_tables(runs: pd.DataFrame) -> tuple[Table, ...]:
    """Return every table of the report."""
    return (
        pruning_table(runs),
        tuning_table(runs),
        difference_table(runs),
        correlation_table(runs),
    )


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
    for key, chosen in at_choices(pruned, choices_of(runs)):
        after = estimate(chosen["pruned_train_loss"]).mean
        rows.append({**key, **_summary(chosen, "loss_change"), "loss_after": after})
    keys = ["network", *METHOD, "choice", "reg"]
    columns = [*keys, "n", "diverged", "mean", "std", "low", "high", "loss_after"]
    caption = (
        "Training loss after pruning minus before it, right after pruning and before any "
        f"fine-tuning, both on the whole training split. {RULE} {SPREAD}"
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
        for tuning, key, chosen in tuned_choices(runs)
    ]
    keys = ["network", *METHOD, "tuning", "choice", "reg"]
    columns = [*keys, "n", "unfinished", "diverged", "mean", "std", "low", "high", "gap"]
    caption = (
        "Test error of the network with the lowest validation error while fine-tuning, of finished "
        f"runs. {RULE} “{BEST_TUNED}” is the λ with the lowest mean validation error after "
        "fine-tuning, among those λ fine-tuned on the most seeds. The gap is the mean test error "
        f"minus that of the network before pruning. {SPREAD}"
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


def correlation_table(runs: pd.DataFrame) -> Table:
    """Return Spearman's ρ of loss change and error gap: all fine-tuned runs, and by stages."""
    among = {
        "all runs": runs,
        "π = 1": runs[runs["stages"] == 1],
        "π > 1": runs[runs["stages"] > 1],
    }
    rows = [
        {"network": network, "tuning": tuning, "among": name, **asdict(found)}
        for name, part in among.items()
        for (network, tuning), found in correlations(part).items()
    ]
    columns = ["network", "tuning", "among", "n", "rho", "low", "high"]
    return Table(
        "rank-correlation",
        "Loss change against error after fine-tuning",
        "Spearman’s ρ of the loss change by pruning and the gap in test error after fine-tuning, "
        "over all fine-tuned runs of a network, whatever their criterion, π, λ and seed, and over "
        "those pruned in one stage and in several. The interval is the 95 % percentile bootstrap "
        "over runs; runs of one seed start from the same network, so it is rather narrow.",
        (
            Column("tuning", "fine-tuning"),
            Column("among", "among"),
            Column("n", "runs", "count"),
            Column("rho", "ρ", "change"),
            Column("low", "95 % from", "change"),
            Column("high", "to", "change"),
        ),
        pd.DataFrame(rows, columns=columns).sort_values(columns[:2], kind="stable"),
    )


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
