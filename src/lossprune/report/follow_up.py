"""The plan after a report: the best λ of each criterion, π and sparsity, for ``lossprune sweep``.

A grid is evaluated right after pruning, which is cheap; what is then worth training is one λ of
each criterion, π and sparsity.  Which one it is, a report knows; the plan says it to the sweep.
"""

from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from lossprune.experiment.folder import BEST
from lossprune.flags import AUTO
from lossprune.report.choice import best_reg_after_pruning
from lossprune.report.layout import METHOD, dense_names, rows_of
from lossprune.report.settings import ASKED, FOUND, MAY_BE_FOUND, SETTINGS

_TRAINING = ("epochs", "batch_size", "lr", "decay", "decay_every", "l2")
_METHOD_FIELDS = ("criterion", "stages", "exponential", "reg")
_FIELDS = {flag.field: name for name, flag in SETTINGS.items() if name != "model_0"}


def write_plans(runs: pd.DataFrame, folder: Path) -> list[Path]:
    """Write ``best.toml``, or ``best-1.toml`` and so on where there are several dense networks.

    Only of prunings of trained networks that are runs of the same results: a plan trains the
    networks that its runs start from, or finds them trained.
    """
    pruned = runs[runs["pruned"] & runs["sparsity"].notna()]
    texts = [
        text for _, group in pruned.groupby(dense_names(pruned)) if (text := _plan(group, runs))
    ]
    names = ["best"] if len(texts) == 1 else [f"best-{n}" for n in range(1, len(texts) + 1)]
    paths = [folder / f"{name}.toml" for name in names]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def _plan(pruned: pd.DataFrame, runs: pd.DataFrame) -> str | None:
    baseline = _baseline(pruned, runs)
    if baseline is None:
        return None
    first = rows_of(pruned.sort_values("epochs"))[0]
    sparsities = sorted(pruned["sparsity"].unique().tolist())
    asked = [flag for flag in ASKED.values() if flag.field in pruned]
    moves = [flag.field for flag in asked]
    moved = [
        flag.field for flag in asked if any(value != flag.default for value in pruned[flag.field])
    ]
    of_the_method = (*_METHOD_FIELDS, *moved, *(["sparsity"] if len(sparsities) > 1 else []))
    methods = pruned[["network", *METHOD, "pm", "exponential", *moves, "sparsity"]]
    best = best_reg_after_pruning(pruned).merge(methods.drop_duplicates(), on=["network", *METHOD])
    best["criterion"] = best["pm"]
    fields = [name for name in _FIELDS if name in first and name not in moves]
    axes: dict[str, Any] = {_FIELDS[name]: first[name] for name in fields}
    axes["seed"] = sorted(int(seed) for seed in pruned["seed"].unique())
    for name in of_the_method:
        values = best[name].unique().tolist()
        axes[_FIELDS[name]] = [_said(name, value) for value in sorted(values, key=_order)]
    name, at_each = first["network"], ""
    if len(sparsities) > 1:
        name, at_each = dense_names(pruned).iloc[0], " at each sparsity"
    lines = [
        f"# {name}: of each criterion and π{at_each} the λ with the lowest mean validation",
        "# loss right after pruning, over the seeds measured. To train them on for 20 epochs:",
        f"#   lossprune sweep best.toml --set nepochs=20,baseline.nepochs={baseline['epochs']}",
        "",
        *_entries(axes),
        "",
        "[baseline]",
        "pe = -1",
        *_entries({_FIELDS[name]: baseline[name] for name in _TRAINING}),
    ]
    for row in rows_of(best):
        rule = {_FIELDS[name]: _said(name, row[name]) for name in of_the_method}
        lines += ["", "[[keep]]", *_entries(rule)]
    return "\n".join(lines) + "\n"


def _baseline(pruned: pd.DataFrame, runs: pd.DataFrame) -> dict[str, Any] | None:
    """Return the run that the prunings start from, of any seed; None where it is not among them."""
    folders = {PurePath(start).parent.name for start in pruned["start"] if start.endswith(BEST)}
    dense = rows_of(runs[~runs["prunes"]])
    return next((run for run in dense if PurePath(run["folder"]).name in folders), None)


def _said(field: str, value: Any) -> Any:
    """Return a setting as a plan says it."""
    if value is None or (field in MAY_BE_FOUND and value == FOUND):
        return AUTO if value == FOUND else "None"
    return value


def _order(value: Any) -> tuple[bool, Any]:
    return value is not None, value


def _entries(flags: dict[str, Any]) -> list[str]:
    return [f"{flag} = {_value(value)}" for flag, value in flags.items()]


def _value(value: Any) -> str:
    """A TOML value.

    >>> _value([True, False]), _value("QM"), _value(1e-5)
    ('[true, false]', '"QM"', '1e-05')
    """
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
