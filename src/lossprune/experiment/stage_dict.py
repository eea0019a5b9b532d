"""What a record says of a pruning stage, and the stage again from that.  No torch here."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossprune.pruning.stages import StageRecord


def stage_dict(stage: "StageRecord") -> dict[str, Any]:
    """Return what a record says of a stage: all of its fields, but none of what was not asked for.

    So records of prunings without a compensation, or anything found on the way, are what they were
    before there was any.
    """
    values = asdict(stage)
    asked = ("compensation", "reg", "rung", "tried", "taken_back", "points", "cost")
    return {name: value for name, value in values.items() if name not in asked or value is not None}


def predicted_change(stage: Mapping[str, Any]) -> float | None:
    """Return ΔL as it is predicted of all that a stage did: of its compensation, if it has one."""
    return (stage.get("compensation") or stage)["predicted_change"]


def stage_of(values: Mapping[str, Any]) -> "StageRecord":
    """Return the stage that :func:`stage_dict` described, as a record holds it."""
    from lossprune.pruning.compensation import CompensationRecord
    from lossprune.pruning.ladder import TriedReg
    from lossprune.pruning.stage_record import StageRecord, TakenBack
    from lossprune.pruning.validation import CurvePoint

    known = dict(values)
    if known.get("compensation") is not None:
        known["compensation"] = CompensationRecord(**known["compensation"])
    for name, kind in (("tried", TriedReg), ("taken_back", TakenBack), ("points", CurvePoint)):
        if known.get(name) is not None:
            known[name] = tuple(kind(**each) for each in known[name])
    return StageRecord(**known)
