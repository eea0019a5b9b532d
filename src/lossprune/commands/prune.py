"""``lossprune prune``: prune a network of one's own and write what came of it."""

import contextlib
import time
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from lossprune.channels.compaction import count_live
from lossprune.channels.connectivity import Connectivity
from lossprune.commands.config import PruneConfig
from lossprune.commands.output import check_out, json_bytes, markdown_table, open_out, print_table
from lossprune.commands.user_code import (
    Batches,
    blaming_users_code,
    call,
    find_function,
    find_object,
)
from lossprune.deployment.sparse_file import is_sparse_file, save_sparse
from lossprune.deployment.sparse_load import load_sparse
from lossprune.experiment.folder import MASK, RECORD
from lossprune.experiment.log import describe_stage
from lossprune.experiment.network_file import load_weights_, read_network, weights_sha256
from lossprune.experiment.prepare import environment_of
from lossprune.experiment.progress import Progress, shown_progress
from lossprune.pruning import (
    CRITERIA,
    LOSSES,
    Mask,
    PruningError,
    StageRecord,
    prune_by_stage,
)
from lossprune.pruning.stages import Stages
from lossprune.torch_state import seeded, using_threads

FORMAT = "lossprune pruning 1"
NETWORK, TABLE = "network.safetensors", "table.md"
_COLUMNS = ("weight", "shape", "weights", "kept", "removed", "sparsity", "unreachable units")


def prune_network(config: PruneConfig, build: str) -> None:
    """Build the network, prune it, write the folder and print the table.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with the flags, the user's functions, the
            network, its data or the folder, in one sentence.
    """
    check_out(config.out, FORMAT, config.overwrite)
    out = config.out.absolute()  # the user's code may change the working folder
    began = time.perf_counter()
    with seeded(config.seed), using_threads(config.threads), blaming_users_code():
        network = _build(build, config.weights)
        with shown_progress() as progress:
            mask, stages, pruning = _prune(network, config, progress)
        found = count_live(network, mask)
        rows = _rows(found, pruning.unused)
        record = {
            "format": FORMAT,
            "settings": _settings(config, build),
            "environment": environment_of(next(network.parameters()).device),
            "network": {
                "class": type(network).__name__,
                "weights_sha256": weights_sha256(network.state_dict()),
            },
            "removed": mask.removed,
            "prunable": mask.total,
            "sparsity": mask.sparsity,
            "effective_sparsity": found.effective_sparsity,
            "layers": [_layer(row) for row in found.layers],
            "unused": pruning.unused,
            "untraced": found.left_dense,
            "stages": [asdict(stage) for stage in stages],
            "seconds": time.perf_counter() - began,
        }
        folder = open_out(out)
        folder.remove(RECORD)
        folder.save(MASK, mask.save)
        folder.save(NETWORK, lambda path: save_sparse(network, mask, path))
        folder.write(TABLE, markdown_table(_COLUMNS, rows).encode())
        folder.write(RECORD, json_bytes(record))
    times = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
    print_table(f"{build}, {mask.criterion}, {times}", _COLUMNS, rows)
    print(f"effective sparsity {found.effective_sparsity:.5f}")
    if pruning.unused:
        names = ",".join(pruning.unused_modules)
        print(f"note: {pruning.told_unused()}; --exclude {names} leaves them out")
    for name, reason in found.left_dense.items():
        print(f"note: units of {name} could not all be followed: {reason}")
    print(f"written: {', '.join((MASK, NETWORK, RECORD, TABLE))} in {config.out}")


def build_network(build: str) -> nn.Module:
    """Return the network that the user's function makes.

    Raises:
        ValueError: there is no such function, it fails, or it makes something else.
    """
    function = find_function(build, "MODULE:BUILD")
    network = call(function, build, "MODULE:BUILD")
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"MODULE:BUILD {build} must return a torch.nn.Module, "
            f"it returned an object of type {type(network).__name__}"
        )
    return network


def _build(build: str, weights: Path | None) -> nn.Module:
    here = Path.cwd()
    network = build_network(build)
    if weights is None:
        return network
    with contextlib.chdir(here):
        if weights.is_file() and is_sparse_file(weights):
            load_sparse(weights, network)
        else:
            given, _, _ = read_network(weights, "--weights: ")
            load_weights_(network, type(network).__name__, weights, given, {}, "--weights: ")
    return network


def _prune(
    network: nn.Module, config: PruneConfig, progress: Progress
) -> tuple[Mask, list[StageRecord], Stages]:
    data = forward = None
    loss: Any = config.loss
    if config.data is not None:
        data = Batches(find_function(config.data, "--data"), config.data, "--data")
    if config.forward is not None:
        forward = find_function(config.forward, "--forward")
    if ":" in config.loss:
        loss = find_object(config.loss, "--loss")
    elif config.loss not in LOSSES:
        raise ValueError(
            f"--loss must be one of {', '.join(LOSSES)} or MODULE:LOSS, got {config.loss!r}"
        )
    pruning = prune_by_stage(
        network,
        config.criterion,
        sparsity=config.sparsity,
        data=data,
        examples=config.examples,
        stages=config.stages,
        schedule=config.schedule,
        reg=config.reg,
        parameters=_listed(config.parameters),
        exclude=_listed(config.exclude),
        scope=config.scope,
        pattern=config.pattern,
        loss=loss,
        forward=forward,
        estimator=config.estimator,
        seed=config.seed,
        origin=_start(config.start),
    )
    pruned, stages = Mask({}), []
    total = config.stages or CRITERIA[config.criterion].stages
    for mask, stage in pruning:
        pruned = mask
        stages.append(stage)
        told = f"sparsity {stage.sparsity:.5f}"
        if stage.loss_before is not None:
            told = describe_stage(asdict(stage), total).split(": ", 1)[1]
        progress.advance("stage", stage.stage, total, told)
    return pruned, stages, pruning


def _start(path: Path | None) -> Mask | None:
    if path is None:
        return None
    try:
        return Mask.load(path)
    except (FileNotFoundError, PruningError) as error:
        raise ValueError(f"--start: {error}") from error


def _listed(names: str | None) -> Any:
    return None if names is None else [name.strip() for name in names.split(",")]


def _rows(found: Connectivity, unused: Collection[str]) -> list[list[str]]:
    rows = [
        [
            layer.name + (" (unused)" if layer.name in unused else ""),
            " × ".join(map(str, layer.shape)),
            f"{layer.total:,}",
            f"{layer.kept:,}",
            f"{layer.removed:,}",
            f"{layer.removed / max(layer.total, 1):.5f}",
            f"{layer.dead_units:,} of {layer.units:,}",
        ]
        for layer in found.layers
    ]
    total, kept = (
        sum(getattr(layer, name) for layer in found.layers) for name in ("total", "kept")
    )
    dead, units = (
        sum(getattr(layer, name) for layer in found.layers) for name in ("dead_units", "units")
    )
    last = ["all", "", f"{total:,}", f"{kept:,}", f"{total - kept:,}"]
    return [*rows, [*last, f"{found.nominal_sparsity:.5f}", f"{dead:,} of {units:,}"]]


def _layer(layer: Any) -> dict[str, Any]:
    return {
        **asdict(layer),
        "removed": layer.removed,
        "sparsity": layer.removed / max(layer.total, 1),
    }


def _settings(config: PruneConfig, build: str) -> dict[str, Any]:
    values = {item.metadata["flag"]: getattr(config, item.name) for item in fields(config)}
    for name in ("out", "overwrite", "debug", "threads"):
        del values[name]
    paths = {name: values[name] and str(values[name]) for name in ("weights", "start")}
    return {"build": build, **values, **paths}
