"""What a run found on its way, from its record: λ, stages, and the sparsity of a budget."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lossprune.experiment.record import RunRecord


def found_of(record: RunRecord) -> dict[str, float]:
    """Return what a run found, by column: numbers of stages and of those taken back, λ, examples.

    Nothing of a run that found nothing.
    """
    stages = record.stages
    regs = [stage["reg"] for stage in stages if "reg" in stage]
    back = [len(stage["taken_back"]) for stage in stages if "taken_back" in stage]
    if not (regs or back or any("points" in stage for stage in stages)):
        return {}
    return {
        "found_stages": len(stages),
        "found_taken_back": sum(back) if back else np.nan,
        "found_reg_low": min(regs, default=np.nan),
        "found_reg_high": max(regs, default=np.nan),
        "found_examples": len(stages) * record.config["nex"],
    }


def regs_of(record: RunRecord) -> list[list[float]]:
    """Return the sparsity that each stage began with, and the λ that it chose."""
    began = [_removed_before(record), *(stage["sparsity"] for stage in record.stages)]
    return [
        [before, stage["reg"]]
        for before, stage in zip(began, record.stages, strict=False)
        if "reg" in stage
    ]


def points_of(record: RunRecord) -> list[tuple[float, float, float | None, bool]]:
    """Return sparsity, loss and error of every mask that was judged, and whether it is the last.

    They rise in sparsity; those beyond the budget are among them.
    """
    points: dict[int, Mapping[str, Any]] = {
        point["removed"]: point for stage in record.stages for point in stage.get("points", ())
    }
    reached = record.stages[-1]["removed"] if record.stages else None
    return [
        (point["sparsity"], point["loss"], point["error"], removed == reached)
        for removed, point in sorted(points.items())
    ]


def _removed_before(record: RunRecord) -> float:
    return record.start.removed / record.prunable if record.prunable else 0.0
