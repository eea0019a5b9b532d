"""Which λ is the best of a criterion at a number of stages: chosen on validation data alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lossprune.report.layout import METHOD, TO_A_BUDGET, rows_of

BEST, ZERO, BEST_TUNED = "best λ", "λ = 0", "best λ after fine-tuning"

# Validation columns only: what is reported on test data is never what was chosen by.
BY_LOSS, BY_ERROR = "pruned_valid_loss", "best_valid_error"


def one_per_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one run per network, method, λ and seed: of the same pruning, the longest trained.

    A pruning evaluated on its own and again before fine-tuning is one measurement, not two.
    """
    keys = ["network", *METHOD, "reg", "seed"]
    longest = runs.sort_values("trained_epochs", ascending=False, kind="stable")
    return longest.drop_duplicates(keys).sort_index()


def ranked_regs(runs: pd.DataFrame, by: str, within: list[str]) -> pd.DataFrame:
    """Return the λ of each group of ``within`` by their ``rank``: 0 has the lowest mean of ``by``.

    Means are over seeds.  Those λ that were measured on the most seeds come first, so that an
    unfinished plan does not choose by luck; ``among`` says how many they are.  A λ with a value
    that is not finite loses to all without; of equal ones the smallest λ is taken.  Right after
    prunings to a budget the mean is of minus the sparsity that they found.

    Args:
        runs: one row per method, λ and seed.
        by: a column of validation scores.
        within: the columns of a group.
    """
    values = runs.assign(value=runs[by].where(np.isfinite(runs[by]), np.inf))
    if by == BY_LOSS:  # a budget says the loss: what counts is how much is removed
        values["value"] = values["value"].mask(
            runs["target"] == TO_A_BUDGET, -runs["achieved_sparsity"]
        )
    means = values.groupby([*within, "reg"])["value"].agg(["count", "mean"]).reset_index()
    means["fewer"] = means["count"] < means.groupby(within)["count"].transform("max")
    means["among"] = (~means["fewer"]).groupby([means[name] for name in within]).transform("sum")
    means = means.sort_values([*within, "fewer", "mean", "reg"], ignore_index=True)
    means["rank"] = means.groupby(within).cumcount()
    return means[[*within, "reg", "rank", "among"]]


def best_reg(runs: pd.DataFrame, by: str, within: list[str]) -> pd.DataFrame:
    """Return the λ of rank 0 of each group; arguments as :func:`ranked_regs`."""
    ranked = ranked_regs(runs, by, within)
    best = ranked[ranked["rank"] == 0]
    return best[[*within, "reg"]].reset_index(drop=True)


def pruned_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pruning that has been done, of whatever came after it."""
    return one_per_seed(runs[runs["pruned"]])


def trained_on(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the prunings that are to be trained on, finished or not."""
    return runs[runs["prunes"] & (runs["epochs"] > runs["prune_epoch"].clip(lower=0))]


def ranked_after_pruning(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the λ of each method by their mean validation loss right after pruning."""
    return ranked_regs(pruned_runs(runs), BY_LOSS, ["network", *METHOD])


def best_reg_after_pruning(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the λ with the lowest mean validation loss right after pruning, per method."""
    return best_reg(pruned_runs(runs), BY_LOSS, ["network", *METHOD])


def choices_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Return network, method, choice and λ: the best by validation loss, and 0."""
    best = best_reg_after_pruning(runs)
    return pd.concat([best.assign(choice=BEST), best.assign(choice=ZERO, reg=0.0)])


def tuned_choices(runs: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any], pd.DataFrame]]:
    """Give tuning, choice and the runs of it, tuning by tuning; unfinished runs are among them."""
    choices = choices_of(runs)
    for (network, tuning), group in trained_on(runs).groupby(["network", "tuning"]):
        tuned = group[group["tuned"]]
        by_error = best_reg(tuned, BY_ERROR, ["network", *METHOD]).assign(choice=BEST_TUNED)
        here = pd.concat([choices[choices["network"] == network], by_error])
        for key, chosen in at_choices(group, here):
            yield str(tuning), key, chosen


def at_choices(
    runs: pd.DataFrame, choices: pd.DataFrame
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Give each choice and the runs at its λ; none, where that λ has not been run."""
    keys = ["network", *METHOD, "reg"]
    groups = dict(iter(runs.groupby(keys)))
    none = runs.iloc[:0]
    for choice in rows_of(choices):
        yield choice, groups.get(tuple(choice[name] for name in keys), none)
