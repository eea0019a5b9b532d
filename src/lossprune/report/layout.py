"""How runs are laid out for comparison: which of them may share a table, and as what.

A *network* is all that must be equal for two prunings to be comparable: architecture, data set,
sparsity, where pruning comes, what it measures on and what it starts from.  A *dense network* is
that at whatever sparsity.  A *method* is what is compared: criterion, number of stages π, schedule
and λ.  Where weights or running statistics move beside the mask, or other weights compete than all,
that is part of the criterion's name, as in ``QM+compensate+finish=5`` or ``QM+scope=layer``.  A
*tuning* is how the pruned network is trained on.  What is left is the seed, over which means are
taken.
"""

import math
import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, cast

import numpy as np
import pandas as pd

from lossprune.pruning.criteria import CRITERIA
from lossprune.pruning.names import counted
from lossprune.report.settings import ASKED, BUDGETS, DEFAULTS, FLAG_OF, FOUND

TO_A_BUDGET = "to a budget"
METHOD = ["criterion", "stages", "schedule"]
_TRAINING = ["lr", "decay", "decay_every", "l2"]
_TUNING = ["epochs", *_TRAINING]
# A network's name begins with these, or they tell methods, tunings and seeds of it apart.
_OF_THE_METHOD = {
    "arch", "dataset", "sparsity", "pm", "stages", "exponential", "reg", "seed", *_TUNING,
    *(flag.field for flag in ASKED.values()), "most_removed",
}  # fmt: skip

# Columns that are outcomes or names, not settings; every other one is a setting, known or not.
_NOT_SETTINGS = {
    "folder", "start", "start_weights", "status", "message", "pruned", "removed", "prunable",
    "seconds", "achieved_sparsity", "trained_epochs", "best_epoch", "loss_change", "error_gap",
    "device", "torch",
}  # fmt: skip
_DERIVED = {"criterion", "target", "prunes", "tuned", "diverged", "schedule", "family", "origin",
            "network", "tuning", "training"}  # fmt: skip
_OUTCOMES = ("before_", "pruned_", "best_", "last_", "found_")  # what their names begin with


def arrange(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with the columns by which tables and figures group them.

    ``criterion`` becomes the name of what is compared, and ``pm`` is the criterion alone.  Added
    are ``family`` (architecture and data set), ``target`` (how far it is pruned), ``network``,
    ``tuning``, ``schedule``, ``prunes``, ``tuned`` (finished training after pruning) and
    ``diverged``.  A run that never prunes has an empty ``network``: it belongs to its family.
    """
    runs = runs.copy()
    runs["prunes"] = runs["prune_epoch"] >= 0
    runs.insert(list(runs.columns).index("criterion"), "pm", runs["criterion"])
    runs["criterion"] = _criteria(runs)
    budget, to_cost = _asked(runs, *BUDGETS), _asked(runs, "multiply_adds")
    open_ended = budget & ~to_cost & ~_asked(runs, "most_removed")
    unspread = (runs["stages"] == 1) | (runs["stages"] == FOUND) | open_ended | ~runs["prunes"]
    spread = np.where(runs["exponential"], "exponential", "linear")
    runs["schedule"] = np.where(unspread, "", spread)
    runs["target"] = [
        TO_A_BUDGET if ends else _target(row)
        for ends, row in zip(budget, rows_of(runs), strict=True)
    ]
    runs["family"] = runs["arch"] + " on " + runs["dataset"]
    runs["origin"] = [
        _origin(start, seed) for start, seed in zip(runs["start"], runs["seed"], strict=True)
    ]
    runs["network"] = _networks(runs)
    runs["tuning"] = _tunings(runs)
    runs["diverged"] = runs["status"] == "diverged"
    after = runs["epochs"] > runs["prune_epoch"].clip(lower=0)
    runs["tuned"] = runs["prunes"] & after & (runs["status"] == "finished")
    return runs


def dense_names(runs: pd.DataFrame) -> pd.Series:
    """Return the name of each pruning's dense network: that of its network without the sparsity."""
    names = [
        row["family"] + row["network"].removeprefix(_family_at(row))
        for row in rows_of(runs[["family", "target", "network"]])
    ]
    return pd.Series(names, index=runs.index, dtype=object)


def at_several_sparsities(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the prunings of dense networks that were pruned to more than one sparsity.

    Added is ``dense``, the name of the dense network.  Those to a budget find theirs.
    """
    prunings = runs[runs["prunes"] & runs["sparsity"].notna()]
    prunings = prunings.assign(dense=dense_names(prunings))
    return prunings[prunings.groupby("dense")["sparsity"].transform("nunique") > 1]


def dense_of_networks(runs: pd.DataFrame) -> dict[str, tuple[str, float, str]]:
    """Return the dense network's name, the sparsity and how far it is pruned, of each network."""
    firsts = runs[runs["prunes"]].drop_duplicates("network")
    dense = dense_names(firsts)
    values = zip(dense, firsts["sparsity"], firsts["target"], strict=True)
    return dict(zip(firsts["network"], values, strict=True))


def network_names(runs: pd.DataFrame) -> list[str]:
    """Return the names of all networks and dense networks."""
    networks = dense_of_networks(runs)
    return sorted({*networks, *(dense for dense, _, _ in networks.values())})


def removed_text(sparsity: float) -> str:
    """Return a sparsity as it is read.

    >>> removed_text(0.98847)
    '98.847 % removed'
    """
    return f"{100 * sparsity:.6g} % removed"


def families_and_networks(runs: pd.DataFrame) -> dict[str, str]:
    """Return the family of each network, in the order of their names; a family without one too."""
    pruning = runs[runs["prunes"]]
    known = dict(zip(pruning["network"], pruning["family"], strict=True))
    for family in runs["family"].unique():
        if family not in known.values():
            known[family] = family
    return dict(sorted(known.items()))


def settings_of(*frames: pd.DataFrame) -> dict[str, str]:
    """Return the columns that are settings, and their flags; unknown ones by their own name."""
    names = dict.fromkeys(name for frame in frames for name in frame.columns)
    flags = {**FLAG_OF, "has_start": "model_0", "most_removed": "pr"}
    return {name: flags.get(name, str(name)) for name in names if _is_setting(name)}


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as dictionaries by column."""
    return cast(list[dict[str, Any]], frame.to_dict("records"))


def criterion_order(criteria: Iterable[str]) -> list[str]:
    """Return the criteria as the library lists them, unknown ones last."""
    known = {name: place for place, name in enumerate(CRITERIA)}
    return sorted(set(criteria), key=lambda name: (known.get(alone(name), len(known)), name))


def alone(criterion: str) -> str:
    """Return the criterion of a name that says what moves beside the mask.

    >>> alone("QM+compensate+finish=5")
    'QM'
    """
    return criterion.partition("+")[0]


def _criteria(runs: pd.DataFrame) -> list[str]:
    """Return the criterion of each run, and the flags by which more than the mask moves."""
    names = runs["criterion"].tolist()
    budget = _asked(runs, *BUDGETS)
    for name, flag in ASKED.items():
        for place, value in enumerate(runs.get(flag.field, ())):
            if name == "multiply_adds" and not budget.iloc[place]:
                continue  # it is part of the network's name
            if value != flag.default and runs["prunes"].iloc[place]:
                names[place] += f"+{name}" + ("" if value is True else f"={value}")
    for place, most in enumerate(runs.get("most_removed", ())):
        names[place] += "" if math.isnan(most) else f"+pr={most}"
    return names


def _asked(runs: pd.DataFrame, *names: str) -> pd.Series:
    """Which runs ask for one of these, by columns that may not be there."""
    return runs.reindex(columns=list(names)).notna().any(axis=1)


def _target(row: dict[str, Any]) -> str:
    """How far a run is pruned that has no budget."""
    if math.isnan(row["sparsity"]):
        return f"{100 * row['multiply_adds']:.6g} % of multiply-adds left"
    return removed_text(row["sparsity"])


def _origin(start: str, seed: int) -> str:
    """Name the start network so that it reads the same for every seed.

    >>> _origin("out/arch=MLP,nepochs=60,seed=1111/best_model.pt", 1111)
    'arch=MLP,nepochs=60,seed=*/best_model.pt'
    >>> _origin("nets/resnet18-1.pt", 1), _origin("out/lr=0.1,pi=1,seed=1/best_model.pt", 1)
    ('nets/resnet18-*.pt', 'lr=0.1,pi=1,seed=*/best_model.pt')
    """
    if not start:
        return ""
    path = PurePath(start)
    name = f"{path.parent.name}/{path.name}"
    said, times = re.subn(rf"\bseed={seed}\b", "seed=*", name)
    # Else a number of its own, not a part of one: seed 1 is not in 18, nor in 0.1.
    return said if times else re.sub(rf"(?<!\d)(?<!\d\.){seed}(?!\.?\d)", "*", name)


def _networks(runs: pd.DataFrame) -> pd.Series:
    pruning = runs[runs["prunes"]].copy()
    trained_before = pruning["prune_epoch"] > 0
    before = _described(pruning, _TRAINING)
    pruning["training"] = [
        text if trains else "" for text, trains in zip(before, trained_before, strict=True)
    ]
    names = pd.Series("", index=runs.index, dtype=object)
    for _, group in pruning.groupby("family"):
        others = [name for name in settings_of(group) if name not in _OF_THE_METHOD]
        varying = [
            name
            for name in [*others, "origin", "training"]
            if len(set(group[name].astype(str))) > 1
        ]
        named = [_network_name(row, varying) for row in rows_of(group)]
        names.loc[group.index] = np.array(named, dtype=object)
    return names


def _is_setting(name: str) -> bool:
    return not (name in _NOT_SETTINGS or name in _DERIVED or name.startswith(_OUTCOMES))


def _network_name(row: dict[str, Any], varying: list[str]) -> str:
    parts = [_family_at(row)]
    for name in varying:
        if name == "origin":
            parts.append(f"from {_short(row['origin'])}" if row["origin"] else "from the seed")
        elif name == "has_start":
            continue  # the origin tells
        elif name == "training":
            parts += [row["training"]] if row["training"] else []
        else:
            parts.append(f"{FLAG_OF.get(name, name)} {row[name]}")
    return ", ".join(parts)


def _family_at(row: dict[str, Any]) -> str:
    return f"{row['family']}, {row['target']}"


def _short(origin: str) -> str:
    """Of a folder name of the protocol, only what is not the default.

    >>> _short("arch=MLP,dec=1.0,nepochs=60,pe=-1,seed=*/best_model.pt")
    'nepochs 60'
    """
    folder, _, file = origin.partition("/")
    parts = [part.partition("=") for part in folder.split(",")]
    if not all(equals for _, equals, _ in parts):
        return origin
    kept = [
        f"{name} {value}"
        for name, _, value in parts
        if name not in ("arch", "dataset", "seed", "pe", "model_0")
        and value != str(DEFAULTS.get(name))
    ]
    return " ".join(kept) + ("" if file == "best_model.pt" else f" {file}") or "a baseline"


def _tunings(runs: pd.DataFrame) -> list[str]:
    others = _described(runs[runs["prunes"]], _TRAINING, runs)
    left = runs["epochs"] - runs["prune_epoch"].clip(lower=0)
    return [
        counted(epochs, "epoch") + (f", {text}" if text else "")
        for epochs, text in zip(left, others, strict=True)
    ]


def _described(
    compared: pd.DataFrame, names: list[str], runs: pd.DataFrame | None = None
) -> list[str]:
    """Describe each run by those settings that are not the same in all runs of its family."""
    runs = compared if runs is None else runs
    varying = {
        family: [name for name in names if group[name].nunique() > 1]
        for family, group in compared.groupby("family")
    }
    return [
        ", ".join(f"{FLAG_OF[name]} {row[name]:g}" for name in varying.get(row["family"], []))
        for row in rows_of(runs[["family", *names]])
    ]
