"""Which λ is the best of a criterion at a number of stages: chosen on validation data alone."""

import numpy as np
import pandas as pd

from lossprune.report.layout import METHOD

# Validation columns only: what is reported on test data is never what was chosen by.
BY_LOSS, BY_ERROR = "pruned_valid_loss", "best_valid_error"


def one_per_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one run per network, method, λ and seed: of the same pruning, the longest trained.

    A pruning evaluated on its own and again before fine-tuning is one measurement, not two.
    """
    keys = ["network", *METHOD, "reg", "seed"]
    longest = runs.sort_values("trained_epochs", ascending=False, kind="stable")
    return longest.drop_duplicates(keys).sort_index()


def best_reg(runs: pd.DataFrame, by: str, within: list[str]) -> pd.DataFrame:
    """Return for each group of ``within`` the λ whose mean of ``by`` over seeds is lowest.

    Only those λ compete that were measured on the most seeds, so that an unfinished plan does not
    choose by luck.  A λ with a value that is not finite loses to all without; of equal ones the
    smallest λ is taken.

    Args:
        runs: one row per method, λ and seed.
        by: a column of validation scores.
        within: the columns of a group.
    """
    values = runs.assign(value=runs[by].where(np.isfinite(runs[by]), np.inf))
    means = values.groupby([*within, "reg"])["value"].agg(["count", "mean"]).reset_index()
    most = means.groupby(within)["count"].transform("max")
    means = means[means["count"] == most]
    best = means.sort_values([*within, "mean", "reg"]).drop_duplicates(within)
    return best[[*within, "reg"]].reset_index(drop=True)


def pruned_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pruning that has been done, of whatever came after it."""
    return one_per_seed(runs[runs["pruned"]])


def best_reg_after_pruning(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the λ with the lowest mean validation loss right after pruning, per method."""
    return best_reg(pruned_runs(runs), BY_LOSS, ["network", *METHOD])
