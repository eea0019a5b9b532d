"""What the figures draw: pure functions from runs to tidy frames, one row per point.

Files and page draw the same numbers.
"""

import numpy as np
import pandas as pd

from lossprune.report.choice import best_reg_after_pruning, pruned_runs
from lossprune.report.estimates import Correlation, spearman
from lossprune.report.layout import METHOD, rows_of
from lossprune.report.reading import EPOCH_COLUMNS, STAGE_COLUMNS, Results

METHOD_KEYS = ["network", *METHOD]
_RUN_KEYS = ["run", *METHOD_KEYS, "reg", "seed"]


def loss_by_reg(runs: pd.DataFrame) -> pd.DataFrame:
    """Return training loss right after pruning by method and λ: mean, lowest, highest and n."""
    pruned = pruned_runs(runs)
    pruned = pruned[np.isfinite(pruned["pruned_train_loss"])]
    return (
        pruned.groupby([*METHOD_KEYS, "reg"])["pruned_train_loss"]
        .agg(["mean", "min", "max", "count"])
        .reset_index()
    )


def at_best_reg(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the prunings at the best λ of their method, one per seed, the longest trained."""
    best = best_reg_after_pruning(runs)
    pruned = pruned_runs(runs).reset_index(names="run")
    return pruned.merge(best, on=[*METHOD_KEYS, "reg"])


def error_by_stages(runs: pd.DataFrame) -> pd.DataFrame:
    """Return test error after fine-tuning by π at the best λ of each method, per tuning."""
    best = best_reg_after_pruning(runs)
    tuned = runs[runs["tuned"] & np.isfinite(runs["best_test_error"])]
    tuned = tuned.merge(best, on=[*METHOD_KEYS, "reg"])
    return (
        tuned.groupby([*METHOD_KEYS, "tuning"])["best_test_error"]
        .agg(["mean", "min", "max", "count"])
        .reset_index()
    )


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


def training_curves(results: Results) -> pd.DataFrame:
    """Return the six scores by epoch, at the best λ, run by run."""
    return _along(results, "epochs", EPOCH_COLUMNS, None)


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
    """Return the sparsity of each layer at the best λ, run by run, where there is a mask."""
    rows = []
    chosen = at_best_reg(results.runs)[["folder", *_RUN_KEYS]]
    layers = results.source.layers(chosen["folder"].tolist())
    for row, sparsities in zip(rows_of(chosen), layers, strict=True):
        rows += [
            {**row, "position": position, "layer": name, "sparsity": sparsity}
            for position, (name, sparsity) in enumerate((sparsities or {}).items())
        ]
    return pd.DataFrame(rows, columns=[*_RUN_KEYS, "position", "layer", "sparsity"])
