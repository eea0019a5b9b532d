"""The table of what runs found on their way: λ, stages, sparsity.  None where nothing was found."""

import pandas as pd

from lossprune.report.choice import pruned_runs
from lossprune.report.table import Column, Table, ordered

_COLUMNS = (
    Column("criterion", "criterion"),
    Column("stages", "π", "stages"),
    Column("reg", "λ", "reg"),
    Column("seed", "seed", "count"),
    Column("found_stages", "stages taken", "count"),
    Column("found_taken_back", "taken back", "count"),
    Column("found_reg_low", "λ from", "chosen"),
    Column("found_reg_high", "to", "chosen"),
    Column("found_examples", "examples", "count"),
    Column("achieved_sparsity", "removed", "percent"),
    Column("loss_rise", "Δ validation loss", "change"),
    Column("error_rise", "Δ error, points", "points"),
)
_CAPTION = (
    "Of each pruning that chose its λ or its stages, or ended where a budget was spent: how many "
    "stages it took and how many longer ones it took back, the least and the largest λ of its "
    "stages, the examples that all stages read (stages taken times --nex), the share of the "
    "weights that is removed, and by how much loss and error on validation data are above those "
    "before pruning, right after it."
)


def found_tables(runs: pd.DataFrame) -> tuple[Table, ...]:
    """Return the table, if a run found anything."""
    if "found_stages" not in runs:
        return ()
    pruned = pruned_runs(runs)
    found = pruned[pruned["found_stages"].notna()]
    found = found.assign(
        loss_rise=found["pruned_valid_loss"] - found["before_valid_loss"],
        error_rise=found["pruned_valid_error"] - found["before_valid_error"],
    )
    keys = ["network", *(column.key for column in _COLUMNS)]
    frame = ordered(found[[*keys, "schedule"]])[keys]
    return (Table("automatic-choices", "Automatic choices", _CAPTION, _COLUMNS, frame),)
