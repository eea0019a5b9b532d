"""What the figures draw: pure functions from runs to tidy frames, one row per point.

Files and page draw the same numbers.
"""

import numpy as np
import pandas as pd

from lossprune.report.choice import (
    best_reg_after_pruning,
    pruned_runs,
    ranked_after_pruning,
    trained_on,
)
from lossprune.report.estimates import Correlation, spearman
from lossprune.report.layout import METHOD, at_several_sparsities, rows_of
from lossprune.report.reading import (
    EPOCH_COLUMNS,
    POINT_COLUMNS,
    REG_COLUMNS,
    STAGE_COLUMNS,
    Results,
)

METHOD_KEYS = ["network", *METHOD]
LOSS, PRUNED_ERROR, ERROR = "loss", "error after pruning", "error"
_BY_SPARSITY = [
    *METHOD_KEYS, "sparsity", "reg", "among", "seed", "measure", "tuning", "value", "dense_value",
    "unfinished", "diverged",
]  # fmt: skip
_RUN_KEYS = ["run", *METHOD_KEYS, "reg", "seed"]


def loss_by_reg(runs: pd.DataFrame) -> pd.DataFrame:
    """Return training loss right after pruning by method and λ: mean, lowest, highest and n.

    ``dense`` is that before pruning, as in the other frames: of a network, the mean over its seeds.
    """
    pruned = pruned_runs(runs)
    pruned = pruned[np.isfinite(pruned["pruned_train_loss"])]
    grouped = pruned.groupby([*METHOD_KEYS, "reg"])["pruned_train_loss"]
    found = grouped.agg(["mean", "min", "max", "count"]).reset_index()
    return _beside_dense(found, runs, "train_loss")


def at_best_reg(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the prunings at the best λ of their method, one per seed, the longest trained."""
    best = best_reg_after_pruning(runs)
    pruned = pruned_runs(runs).reset_index(names="run")
    return pruned.merge(best, on=[*METHOD_KEYS, "reg"])


def error_by_stages(runs: pd.DataFrame) -> pd.DataFrame:
    """Return test error after fine-tuning at the best λ of each method, a row a seed and tuning."""
    best = best_reg_after_pruning(runs)
    tuned = runs[runs["tuned"] & np.isfinite(runs["best_test_error"])]
    tuned = tuned.merge(best, on=[*METHOD_KEYS, "reg"])
    columns = [*METHOD_KEYS, "sparsity", "tuning", "seed", "best_test_error"]
    return _beside_dense(tuned[columns], runs, "test_error")


def by_sparsity(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what pruning to each sparsity came to, at the λ that is best there, a row a seed.

    Of dense networks that were pruned to several sparsities; ``network`` is their name.  Rows have
    a ``measure``, the training loss and the test error right after pruning and the test error
    after each tuning, its ``value``, and its ``dense_value`` before pruning.  A value that a run
    has not come to, or that is not finite, is NaN, and the run ``unfinished`` or ``diverged``.
    ``among`` says how many λ the best is of.
    """
    several = at_several_sparsities(runs)
    ranked = ranked_after_pruning(several)
    best = ranked[ranked["rank"] == 0]
    pruned, tuned = (
        chosen.merge(best, on=[*METHOD_KEYS, "reg"])
        for chosen in (pruned_runs(several), trained_on(several))
    )
    pruned = pruned.assign(tuning="", unfinished=False)
    pruned["diverged"] = ~np.isfinite(pruned["pruned_train_loss"])
    tuned = tuned.assign(unfinished=tuned["status"] == "running")
    tuned["best_test_error"] = tuned["best_test_error"].where(tuned["tuned"])
    parts = [
        chosen.assign(
            measure=measure,
            value=chosen[value].where(np.isfinite(chosen[value])),
            dense_value=chosen[dense],
        )
        for measure, chosen, value, dense in (
            (LOSS, pruned, "pruned_train_loss", "before_train_loss"),
            (PRUNED_ERROR, pruned, "pruned_test_error", "before_test_error"),
            (ERROR, tuned, "best_test_error", "before_test_error"),
        )
    ]
    rows = pd.concat(parts, ignore_index=True).assign(network=lambda rows: rows["dense"])
    return rows[_BY_SPARSITY]


def change_and_gap(runs: pd.DataFrame) -> pd.DataFrame:
    """Return each fine-tuned run's loss change by pruning and error gap after fine-tuning."""
    tuned = runs[runs["tuned"]]
    finite = np.isfinite(tuned["loss_change"]) & np.isfinite(tuned["error_gap"])
    columns = [*METHOD_KEYS, "tuning", "reg", "seed", "loss_change", "error_gap"]
    return tuned.loc[finite, columns]


def correlations(runs: pd.DataFrame) -> dict[tuple[str, str], Correlation]:
    """Return Spearman's ρ of loss change and error gap by network and tuning."""
    points = change_and_gap(runs)
    return {
        (str(network), str(tuning)): spearman(
            group["loss_change"].to_numpy(), group["error_gap"].to_numpy()
        )
        for (network, tuning), group in points.groupby(["network", "tuning"])
    }


def stage_changes(results: Results) -> pd.DataFrame:
    """Return predicted and realised change of the loss by stage, at the best λ, run by run."""
    return _along(results, "stages", STAGE_COLUMNS, "stage")


def budget_curves(results: Results) -> pd.DataFrame:
    """Return loss and error on validation data by sparsity, of each mask that a run judged."""
    return _along(results, "points", POINT_COLUMNS, None)


def regs_of_stages(results: Results) -> pd.DataFrame:
    """Return the λ that each stage chose, by the sparsity that it began with, run by run."""
    return _along(results, "regs", REG_COLUMNS, "stage")


def training_curves(results: Results) -> pd.DataFrame:
    """Return the six scores by epoch, at the best λ, run by run."""
    curves = _along(results, "epochs", EPOCH_COLUMNS, None)
    return _beside_dense(curves, results.runs, "valid_error")


def _beside_dense(rows: pd.DataFrame, runs: pd.DataFrame, score: str) -> pd.DataFrame:
    """Add the mean of a score before pruning, over the seeds of each network, as ``dense``."""
    networks = runs[runs["pruned"]].drop_duplicates(["network", "seed"]).groupby("network")
    return rows.assign(dense=rows["network"].map(networks[f"before_{score}"].mean()))


def _along(
    results: Results, what: str, columns: tuple[str, ...], number: str | None
) -> pd.DataFrame:
    parts = []
    for row in rows_of(at_best_reg(results.runs)[_RUN_KEYS]):
        values = getattr(results.histories[row["run"]], what)
        if not len(values):
            continue
        part = pd.DataFrame(values.astype(np.float64), columns=list(columns))
        if number is not None:
            part[number] = np.arange(1, len(part) + 1)
        parts.append(part.assign(**row))
    empty = pd.DataFrame(columns=[*columns, *([number] if number else []), *_RUN_KEYS])
    return pd.concat(parts, ignore_index=True) if parts else empty


def layers(results: Results) -> pd.DataFrame:
    """Return the sparsity of each layer at the best λ, run by run, where there is a mask.

    Its ``position`` is among all layers of its network, of which a run may leave some out.
    """
    chosen = at_best_reg(results.runs)[["folder", *_RUN_KEYS]]
    sparsities = results.source.layers(chosen["folder"].tolist())
    of_runs = [(row, of or {}) for row, of in zip(rows_of(chosen), sparsities, strict=True)]
    places: dict[str, dict[str, int]] = {}
    for row, of in sorted(of_runs, key=lambda pair: -len(pair[1])):
        names = places.setdefault(row["network"], {})
        for name in of:
            names.setdefault(name, len(names))
    rows = [
        {**row, "position": places[row["network"]][name], "layer": name, "sparsity": sparsity}
        for row, of in of_runs
        for name, sparsity in of.items()
    ]
    return pd.DataFrame(rows, columns=[*_RUN_KEYS, "position", "layer", "sparsity"])
