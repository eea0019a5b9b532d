"""What differs between two runs, or two folders of results: in settings and in outcome."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lossprune.experiment.folder import RECORD, RunFolder
from lossprune.experiment.record import RunRecord
from lossprune.pruning.names import counted
from lossprune.report.layout import criterion_order, rows_of, settings_of
from lossprune.report.reading import MOMENTS, read_results
from lossprune.report.table import NOTHING, stages_text
from lossprune.text_table import aligned

_SCORES = {
    "train_loss": "training loss",
    "valid_error": "validation error",
    "test_loss": "test loss",
    "test_error": "test error",
}
_MEASURES = {
    "pruned_train_loss": "training loss after pruning",
    "pruned_test_error": "test error after pruning",
    "best_test_error": "test error, best network",
}
_LISTED = 5


def compare(a: Path, b: Path) -> str:
    """Return, as lines of text, what differs between two runs or two sets of results.

    Results are a folder, or a file of their records.

    Raises:
        FileNotFoundError: one is not there.
        ValueError: one is a run and the other are results, or one holds no record.
    """
    for path in (a, b):
        if not path.exists():
            raise FileNotFoundError(
                f"no run and no folder of results at {path}, nor a file of records"
            )
    kinds = [(path / RECORD).is_file() for path in (a, b)]
    if kinds[0] != kinds[1]:
        run, folder = (a, b) if kinds[0] else (b, a)
        raise ValueError(f"{run} is one run and {folder} is not: compare two runs or two folders")
    return "\n".join(_compare_runs(a, b) if kinds[0] else _compare_folders(a, b))


def _compare_runs(a: Path, b: Path) -> list[str]:
    first, second = (_record(path) for path in (a, b))
    lines = [f"A  {a}", f"B  {b}", ""]
    settings = _differing(first.config, second.config)
    lines += _section("settings", [["setting", "A", "B"], *settings], "the same settings")
    around = _differing(_around(first), _around(second))
    lines += _section("environment", [["what", "A", "B"], *around], "the same environment")
    outcomes = [["outcome", "A", "B", "B - A"]]
    if (first.status, first.message) != (second.status, second.message):
        outcomes.append(["status", first.status, second.status, ""])
    for moment in MOMENTS:
        told = moment.replace("_", " ")
        outcomes += _score_rows(told, getattr(first, moment), getattr(second, moment))
    if first.removed != second.removed:
        change = f"{second.removed - first.removed:+d}"
        outcomes.append(["weights removed", str(first.removed), str(second.removed), change])
    same = "the same outcome to the last bit"
    return [*lines, *_section("outcome", outcomes, same)][:-1]


def _record(path: Path) -> RunRecord:
    record = RunFolder(path).record()
    assert record is not None  # its file was there
    return record


def _around(record: RunRecord) -> dict[str, Any]:
    return {**record.environment, "start weights": record.start.weights_sha256[:12]}


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[list[str]]:
    names = [*first, *(name for name in second if name not in first)]
    return [
        [name, str(first.get(name, NOTHING)), str(second.get(name, NOTHING))]
        for name in names
        if first.get(name, NOTHING) != second.get(name, NOTHING)
    ]


def _score_rows(moment: str, first: Any, second: Any) -> list[list[str]]:
    rows = []
    for score, name in _SCORES.items():
        left, right = (
            math.nan if at is None else getattr(at.scores, score) for at in (first, second)
        )
        if left == right or (math.isnan(left) and math.isnan(right)):
            continue
        percent = score.endswith("error")
        values = [_told(left, percent), _told(right, percent), _told(right - left, percent, "+")]
        rows.append([f"{name}, {moment}", *values])
    return rows


def _told(value: float, percent: bool, sign: str = "") -> str:
    """A score, or with the sign ``+`` a difference of two; an error in percent or points."""
    if math.isnan(value):
        return NOTHING
    unit = "points" if sign else "%"
    return f"{100 * value:{sign}.2f} {unit}" if percent else f"{value:{sign}.5f}"


def _compare_folders(a: Path, b: Path) -> list[str]:
    first, second = read_results(a), read_results(b)
    left, right = first.runs, second.runs
    lines = []
    for name, results in (("A", first), ("B", second)):
        count = results.runs["status"].value_counts()
        told = ", ".join(f"{number} {status}" for status, number in count.items())
        left_out = f", {len(results.left_out)} left out" if results.left_out else ""
        lines.append(
            f"{name}  {results.source.path}: {counted(len(results.runs), 'run')} ({told}{left_out})"
        )
    lines.append("")
    settings = _differing_settings(left, right)
    lines += _section("settings", [["setting", "A", "B"], *settings], "the same settings")
    pairs, rest = pair_runs(left, right)
    for name, frame in zip("AB", rest, strict=True):
        if len(frame):
            listed = [f"  {folder}" for folder in frame["folder"][:_LISTED]]
            more = [f"  and {len(frame) - _LISTED} more"] if len(frame) > _LISTED else []
            lines += [f"only in {name}: {counted(len(frame), 'run')}", *listed, *more, ""]
    if pairs.empty:
        return [*lines, "no run of A has its like in B"]
    return [*lines, *_outcome_lines(pairs)]


def _differing_settings(left: pd.DataFrame, right: pd.DataFrame) -> list[list[str]]:
    rows = []
    for name, flag in settings_of(left, right).items():
        values = [_distinct(frame, name) for frame in (left, right)]
        if values[0] != values[1]:
            rows.append([flag, *(", ".join(map(str, found)) or NOTHING for found in values)])
    return rows


def _distinct(frame: pd.DataFrame, name: str) -> list[Any]:
    if name not in frame:
        return []
    found = frame[name].dropna().unique().tolist()
    return sorted(found, key=lambda value: (str(type(value)), value))


def pair_runs(
    left: pd.DataFrame, right: pd.DataFrame
) -> tuple[pd.DataFrame, tuple[pd.DataFrame, pd.DataFrame]]:
    """Return pairs of runs as rows with ``_a`` and ``_b`` columns, and what is left on each side.

    Runs pair that have the same settings; of those left over, the ones that have the same
    settings but for those in which the two sides differ as a whole, such as the number of epochs,
    where that names exactly one on each side.
    """
    names = list(settings_of(left, right))
    same, left_rest, right_rest = _join(left, right, names)
    alike = [name for name in names if _distinct(left_rest, name) == _distinct(right_rest, name)]
    like, left_rest, right_rest = _join(left_rest, right_rest, alike)
    return pd.concat([same, like], ignore_index=True), (left_rest, right_rest)


def _join(
    left: pd.DataFrame, right: pd.DataFrame, names: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    sides = [
        frame.assign(key=list(map(str, rows_of(frame.reindex(columns=names)))))
        for frame in (left, right)
    ]
    single = [side[~side["key"].duplicated(keep=False)] for side in sides]
    pairs = single[0].merge(single[1], on="key", suffixes=("_a", "_b"))
    rest = [side[~side["key"].isin(pairs["key"])].drop(columns="key") for side in sides]
    return pairs.drop(columns="key"), rest[0], rest[1]


def _outcome_lines(pairs: pd.DataFrame) -> list[str]:
    heads = ["outcome", "criterion", "π", "pairs", "equal", "A mean", "B mean", "B - A", "largest"]
    rows = [heads]
    groups = _by_method(pairs)
    equal = []
    for measure, title in _MEASURES.items():
        sides = pairs[[f"{measure}_a", f"{measure}_b"]].dropna()
        if (sides.iloc[:, 0] == sides.iloc[:, 1]).all():
            equal += (
                [] if sides.empty else [f"{title}: the same to the last bit in {len(sides)} pairs"]
            )
            continue
        percent = measure.endswith("error")
        for label, group in groups:
            values = group[[f"{measure}_a", f"{measure}_b"]].dropna().to_numpy()
            if not len(values):
                continue
            change = values[:, 1] - values[:, 0]
            largest = change[np.argmax(np.abs(change))]
            row = [title, *label, str(len(values)), str(int((change == 0).sum()))]
            row += [_told(values[:, side].mean(), percent) for side in (0, 1)]
            rows.append([*row, *(_told(value, percent, "+") for value in (change.mean(), largest))])
    like = int((pairs["status_a"] != pairs["status_b"]).sum())
    head = f"{len(pairs)} pairs of runs" + (f", {like} with another status" if like else "")
    table = _indented(rows) if len(rows) > 1 else []
    return [f"{head}; means over pairs" if table else head, *equal, *table]


def _by_method(pairs: pd.DataFrame) -> list[tuple[list[str], pd.DataFrame]]:
    """Return criterion and π as text, and the pairs of it; baselines first."""
    prunes = pairs["prunes_a"].astype(bool)
    groups = [(["baseline", ""], pairs[~prunes])]
    pruning = pairs[prunes]
    for criterion in criterion_order(pruning["criterion_a"]):
        own = pruning[pruning["criterion_a"] == criterion]
        for (stages, schedule), part in own.groupby(["stages_a", "schedule_a"]):
            groups.append(
                ([criterion, f"{stages_text(int(str(stages)))} {schedule}".strip()], part)
            )
    return groups


def _section(title: str, rows: list[list[str]], nothing: str) -> list[str]:
    return [title, *_indented(rows), ""] if len(rows) > 1 else [nothing, ""]


def _indented(rows: list[list[str]]) -> list[str]:
    return [f"  {line}" for line in aligned(rows, left=len(rows[0]))]
