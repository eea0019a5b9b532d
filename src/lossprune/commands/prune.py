"""``lossprune prune``: prune a network of one's own and write what came of it."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossprune.commands import EXIT_OK
from lossprune.commands.output import NETWORK, TABLE, check_out, json_bytes, open_out
from lossprune.experiment.folder import MASK, RECORD
from lossprune.experiment.log import describe_stage
from lossprune.flags import (
    MOST_REG,
    check_fraction,
    check_not_negative,
    check_one_of,
    check_seed,
    check_threads,
    check_whole,
    flag,
)
from lossprune.progress import Progress, shown_progress
from lossprune.pruning.criteria import CRITERIA
from lossprune.pruning.curvature.estimators import ESTIMATORS
from lossprune.pruning.schedules import MOST_STAGES, SCHEDULES
from lossprune.pruning.scopes import SCOPES
from lossprune.text_table import markdown_table, print_table

if TYPE_CHECKING:
    from torch import nn

    from lossprune.channels.connectivity import Connectivity
    from lossprune.pruning import Mask, StageRecord
    from lossprune.pruning.stages import Stages

FORMAT = "lossprune pruning 1"
_COLUMNS = ("weight", "shape", "weights", "kept", "removed", "sparsity", "unreachable units")


@dataclass(frozen=True)
class PruneConfig:
    """Prune a network of your own: MODULE:BUILD makes it.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    data: str | None = flag(
        None, "data", "MODULE:FUNCTION that returns batches of (inputs, targets); MP needs none"
    )
    sparsity: float | None = flag(None, "sparsity", "fraction of the weights to remove, in [0, 1)")
    criterion: str = flag("QM", "criterion", f"one of {', '.join(CRITERIA)}")
    stages: int | None = flag(None, "stages", "number of pruning stages π; the criterion's default")
    schedule: str = flag("exponential", "schedule", f"one of {', '.join(SCHEDULES)}")
    reg: float = flag(0.0, "reg", "step-size penalty λ on every saliency")
    examples: int | None = flag(None, "examples", "examples to read at each stage; none: all")
    loss: str = flag("cross_entropy", "loss", "name of a loss, or MODULE:LOSS of your own")
    forward: str | None = flag(
        None, "forward", "MODULE:FUNCTION of (model, batch) that returns (outputs, targets)"
    )
    parameters: str | None = flag(
        None, "parameters", "which weights to prune: names or patterns, joined by commas"
    )
    exclude: str | None = flag(None, "exclude", "which of them not, in the same way")
    scope: str = flag("global", "scope", f"which weights compete: {', '.join(SCOPES)}")
    pattern: str = flag("unstructured", "pattern", "unstructured, or N:M such as 2:4")
    estimator: str = flag("exact", "estimator", f"of the curvature: {', '.join(ESTIMATORS)}")
    weights: Path | None = flag(
        None, "weights", "state dict (.pt), safetensors or sparse file to load into the network"
    )
    start: Path | None = flag(
        None, "start", "mask of an earlier prune (mask.safetensors) to go on from"
    )
    seed: int = flag(1111, "seed", "of torch while the network is built, and of each stage")
    threads: int | None = flag(None, "threads", "CPU threads; if not given, torch's own choice")
    out: Path = flag(Path("pruned"), "out", "folder to write into")
    overwrite: bool = flag(False, "overwrite", "replace what an earlier prune wrote there")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_one_of("criterion", self.criterion, CRITERIA)
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_one_of("scope", self.scope, SCOPES)
        if self.sparsity is None and self.pattern == "unstructured":
            raise ValueError("--sparsity is missing: the fraction of the weights to remove")
        if self.sparsity is not None:
            check_fraction("sparsity", self.sparsity)
        check_not_negative("reg", self.reg, MOST_REG)
        check_seed("seed", self.seed)
        check_whole("stages", self.stages, 1, MOST_STAGES)
        check_whole("examples", self.examples, 1)
        check_threads(self.threads)


def do(config: PruneConfig, build: str | None = None) -> int:
    """Build the network, prune it, write the folder and print the table.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with the flags, the user's functions, the
            network, its data or the folder, in one sentence.
    """
    if build is None:
        raise ValueError("prune takes MODULE:BUILD, such as mine.networks:build")
    from lossprune.channels.compaction import count_live
    from lossprune.commands.user_network import build_network
    from lossprune.deployment.sparse_file import save_sparse
    from lossprune.torch_state import seeded, using_threads
    from lossprune.user_code import blaming_users_code

    check_out(config.out, FORMAT, config.overwrite)
    out = config.out.absolute()  # the user's code may change the working folder
    began = time.perf_counter()
    with seeded(config.seed), using_threads(config.threads), blaming_users_code():
        network = build_network(build, config.weights)
        with shown_progress() as progress:
            mask, stages, pruning = _prune(network, config, progress)
        found = count_live(network, mask)
        rows = _rows(found, pruning.unused)
        record = {
            "format": FORMAT,
            "settings": _settings(config, build),
            **_outcome(network, mask, found),
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
    for line in _notes(found, pruning):
        print(line)
    print(f"written: {', '.join((MASK, NETWORK, RECORD, TABLE))} in {config.out}")
    return EXIT_OK


def _notes(found: "Connectivity", pruning: "Stages") -> Iterator[str]:
    yield f"effective sparsity {found.effective_sparsity:.5f}"
    if pruning.unused:
        names = ",".join(pruning.unused_modules)
        yield f"note: {pruning.told_unused()}; --exclude {names} leaves them out"
    for name, reason in found.left_dense.items():
        yield f"note: units of {name} could not all be followed: {reason}"


def _prune(
    network: "nn.Module", config: PruneConfig, progress: Progress
) -> "tuple[Mask, list[StageRecord], Stages]":
    from lossprune.pruning import Mask, prune_by_stage

    pruning = prune_by_stage(
        network,
        config.criterion,
        sparsity=config.sparsity,
        examples=config.examples,
        stages=config.stages,
        schedule=config.schedule,
        reg=config.reg,
        parameters=_listed(config.parameters),
        exclude=_listed(config.exclude),
        scope=config.scope,
        pattern=config.pattern,
        estimator=config.estimator,
        seed=config.seed,
        origin=_start(config.start),
        **_users_functions(config),
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


def _users_functions(config: PruneConfig) -> dict[str, Any]:
    """Return data, loss and forward function as the flags name them."""
    from lossprune.pruning import LOSSES
    from lossprune.user_code import Batches, find_function, find_object

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
    return {"data": data, "forward": forward, "loss": loss}


def _start(path: Path | None) -> "Mask | None":
    if path is None:
        return None
    from lossprune.pruning import Mask, PruningError

    try:
        return Mask.load(path)
    except (FileNotFoundError, PruningError) as error:
        raise ValueError(f"--start: {error}") from error


def _listed(names: str | None) -> Any:
    return None if names is None else [name.strip() for name in names.split(",")]


def _rows(found: "Connectivity", unused: Collection[str]) -> list[list[str]]:
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
    total, kept, dead, units = (
        sum(getattr(layer, name) for layer in found.layers)
        for name in ("total", "kept", "dead_units", "units")
    )
    last = ["all", "", f"{total:,}", f"{kept:,}", f"{total - kept:,}"]
    return [*rows, [*last, f"{found.nominal_sparsity:.5f}", f"{dead:,} of {units:,}"]]


def _outcome(network: "nn.Module", mask: "Mask", found: "Connectivity") -> dict[str, Any]:
    from lossprune.experiment.environment import environment_of
    from lossprune.experiment.network_file import weights_sha256

    return {
        "environment": environment_of(next(network.parameters()).device),
        "network": {
            "class": type(network).__name__,
            "weights_sha256": weights_sha256(network.state_dict()),
        },
        "removed": mask.removed,
        "prunable": mask.total,
        "sparsity": mask.sparsity,
        "effective_sparsity": found.effective_sparsity,
        "layers": [
            {
                **asdict(layer),
                "removed": layer.removed,
                "sparsity": layer.removed / max(layer.total, 1),
            }
            for layer in found.layers
        ],
    }


def _settings(config: PruneConfig, build: str) -> dict[str, Any]:
    values = asdict(config)
    for name in ("out", "overwrite", "debug", "threads"):
        del values[name]
    paths = {name: values[name] and str(values[name]) for name in ("weights", "start")}
    return {"build": build, **values, **paths}
