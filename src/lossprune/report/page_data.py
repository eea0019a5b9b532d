"""The data inside the page: compact, so that thousands of runs stay usable."""

import base64
import json
import math
import os
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lossprune.flags import AUTO
from lossprune.report import series
from lossprune.report.choice import ranked_after_pruning
from lossprune.report.labels import LABELS, MEASURES, file_slugs
from lossprune.report.layout import (
    criterion_order,
    dense_of_networks,
    families_and_networks,
    network_names,
    rows_of,
)
from lossprune.report.palette import CRITERION_COLOURS, METHOD_COLOURS, SHADES
from lossprune.report.reading import Results
from lossprune.report.settings import FOUND, command_of
from lossprune.report.table import Table, reg_text, shown

_POINTS = 80  # of a curve or of a run's stages: more than a panel has pixels to tell apart
_SCATTER = 2000  # points of the stages figure; more are thinned evenly
_DIGITS = 5

_RUN_COLUMNS = {
    "criterion": "criterion", "stages": "stages", "schedule": "schedule", "reg": "reg",
    "seed": "seed", "tuning": "tuning", "status": "status", "message": "message",
    "sparsity": "achieved_sparsity", "lossBefore": "before_train_loss",
    "lossAfter": "pruned_train_loss", "lossChange": "loss_change",
    "errorBefore": "before_test_error", "errorPruned": "pruned_test_error",
    "error": "best_test_error", "gap": "error_gap",
    "validBefore": "before_valid_error", "validError": "best_valid_error",
    "epochs": "trained_epochs", "seconds": "seconds", "folder": "folder", "tuned": "tuned",
    "prunes": "prunes",
}  # fmt: skip


def page_data(results: Results, tables: tuple[Table, ...], figures: list[str]) -> dict[str, Any]:
    """Return what the page draws, as plain values; ``figures`` are the files beside the page."""
    runs = results.runs
    networks = families_and_networks(runs)
    return {
        "networks": _networks(runs, networks),
        "criteria": criterion_order(runs.loc[runs["prunes"], "criterion"]),
        "regs": [[float(reg), reg_text(float(reg))] for reg in sorted(runs["reg"].unique())],
        "runs": _runs(results, networks),
        "tables": [_table(table) for table in tables],
        "stages": _stages(results),
        "points": _along_weights(series.budget_curves(results), ("loss", "error", "reached")),
        "regsOfStages": _along_weights(series.regs_of_stages(results), ("chosen",)),
        "curves": _curves(results),
        "layers": _layers(results),
        "figures": figures,
        "slugs": file_slugs(network_names(runs)),
        "labels": {name: asdict(labels) for name, labels in LABELS.items()},
        "measures": MEASURES,
        "palette": {
            "criteria": list(CRITERION_COLOURS),
            "methods": len(METHOD_COLOURS),
            "shades": SHADES,
        },
    }


def embedded_details(results: Results, budget: float) -> dict[int, str]:
    """Return log and record of as many runs as fit in ``budget`` bytes, compressed, by run.

    Each is base64 of zlib of JSON with ``log`` and ``record``.  Runs come in the order of their
    folders; the first that does not fit ends it, so that the page says plainly from where on it
    links.
    """
    details: dict[int, str] = {}
    used = 0
    texts = results.source.texts(results.runs["folder"].tolist())
    for run, (log, record) in enumerate(texts):
        text = json.dumps({"log": log, "record": record})
        packed = base64.b64encode(zlib.compress(text.encode(), 6)).decode()
        used += len(packed)
        if used > budget:
            break
        details[run] = packed
    return details


def as_json(data: Any) -> str:
    """Return JSON that may stand inside a ``script`` element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plain(value: Any) -> Any:
    """Return a value for JSON: few digits, and None for what is not finite."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return str(value)


def _networks(runs: pd.DataFrame, families: dict[str, str]) -> list[dict[str, Any]]:
    known = dense_of_networks(runs)
    networks = []
    for name, family in families.items():
        dense, sparsity, target = known.get(name, (name, None, ""))
        networks.append(
            {
                **{"name": name, "family": family, "dense": dense},
                "sparsity": None if sparsity is None or math.isnan(sparsity) else sparsity,
                "removed": target,
                "correlations": _correlations(runs, name),
            }
        )
    return networks


def _runs(results: Results, networks: dict[str, str]) -> list[dict[str, Any]]:
    rows = []
    ranked = ranked_after_pruning(results.runs).set_index([*series.METHOD_KEYS, "reg"])
    ranks = {key: int(rank) for key, rank in ranked["rank"].items()}
    folder = results.source.folder or Path(results.source.name)
    path = os.path.relpath(folder) if folder.is_absolute() else str(folder)
    names = list(networks)
    for row in rows_of(results.runs):
        shown_row = {key: _plain(row[column]) for key, column in _RUN_COLUMNS.items()}
        shown_row["reg"] = float(row["reg"])
        shown_row["rank"] = ranks.get(tuple(row[key] for key in (*series.METHOD_KEYS, "reg")))
        shown_row["network"] = names.index(row["network"]) if row["prunes"] else -1
        shown_row["family"] = row["family"]
        own = Path(path, row["folder"]).parent
        shown_row["command"] = command_of({str(key): value for key, value in row.items()}, str(own))
        rows.append(shown_row)
    return rows


def _correlations(runs: pd.DataFrame, network: str) -> list[dict[str, Any]]:
    return [
        {"tuning": tuning, "n": rho.n}
        | {name: _plain(getattr(rho, name)) for name in ("rho", "low", "high")}
        for (_, tuning), rho in series.correlations(runs[runs["network"] == network]).items()
    ]


def _table(table: Table) -> dict[str, Any]:
    rows = []
    for row in rows_of(table.frame):
        values = {str(name): value for name, value in row.items()}
        rows.append(
            {
                "network": values["network"],
                "cells": [shown(values, column) for column in table.columns],
                "sort": [_plain(values[column.key]) for column in table.columns],
                **_filter_keys(values),
            }
        )
    return {
        "name": table.name,
        "title": table.title,
        "caption": table.caption,
        "columns": [
            {"heading": column.heading, "text": column.kind == "text"} for column in table.columns
        ],
        "rows": rows,
        "several": table.several,
    }


def _filter_keys(row: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the criteria, stages and λ that a row is about."""
    if "criterion" in row:
        methods, regs = [(row["criterion"], row["stages"])], [float(row["reg"])]
    else:  # the two sides of a difference, or a statement about all runs
        labels = [row[side].rpartition(" π ") for side in ("first", "second") if side in row]
        methods, regs = [(criterion, rest.split()[0]) for criterion, _, rest in labels], []
    return {
        "criterion": [criterion for criterion, _ in methods],
        "stages": [FOUND if stages == AUTO else int(stages) for _, stages in methods],
        "reg": regs,
    }


def _stages(results: Results) -> list[dict[str, Any]]:
    data = series.stage_changes(results)
    data = data[np.isfinite(data["predicted_change"].astype(float))]
    parts = []
    for _, network in data.groupby("network"):
        step = -(-len(network) // _SCATTER)
        for run, part in network.groupby("run"):
            columns = ("stage", "predicted_change", "realised_change")
            points = part[list(columns)].to_numpy(dtype=float)[::step]
            parts.append({"run": run, "points": [[_plain(x) for x in point] for point in points]})
    return parts


def _along_weights(data: pd.DataFrame, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return values by the share of weights kept in per cent, which stands first, run by run."""
    parts = []
    for run, part in data.groupby("run"):
        rows = zip(100 * (1 - part["sparsity"]), *(part[name] for name in columns), strict=True)
        parts.append({"run": run, "points": [[_plain(float(x)) for x in row] for row in rows]})
    return parts


def _curves(results: Results) -> list[dict[str, Any]]:
    data = series.training_curves(results)
    parts = []
    for run, part in data.groupby("run"):
        keep = np.unique(np.linspace(0, len(part) - 1, min(len(part), _POINTS)).astype(int))
        points = part[["epoch", "valid_error"]].to_numpy(dtype=float)[keep]
        parts.append({"run": run, "points": [[int(x), _plain(y)] for x, y in points]})
    return parts


def _layers(results: Results) -> list[dict[str, Any]]:
    return [
        {
            "run": run,
            "names": part["layer"].tolist(),
            "kept": [_plain(1 - sparsity) for sparsity in part["sparsity"]],
        }
        for run, part in series.layers(results).groupby("run")
    ]
