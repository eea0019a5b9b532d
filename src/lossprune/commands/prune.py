"""``lossprune prune``: prune a network of one's own and write what came of it."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossprune.commands import EXIT_OK, prune_folder
from lossprune.commands.output import check_out, told_files
from lossprune.commands.prune_flags import PruneConfig
from lossprune.commands.prune_folder import is_checkpoint
from lossprune.commands.pruned_folder import (
    COLUMNS,
    FILES,
    FORMAT,
    SPARE,
    moves_of,
    notes_of,
    outcome_of,
    rows_of,
    table_of,
    write_folder,
)
from lossprune.experiment.log import stage_in_words, told_found
from lossprune.experiment.stage_dict import stage_dict
from lossprune.flags import (
    listed_names,
    read_bytes,
)
from lossprune.progress import Progress, shown_progress
from lossprune.pruning.criteria import SPARSE_GPT
from lossprune.pruning.names import counted
from lossprune.text_table import print_lines, print_table

if TYPE_CHECKING:
    from torch import nn

    from lossprune.commands.evaluation import LossAndError
    from lossprune.commands.user_data import UsersData
    from lossprune.deployment.file_size import FileSize
    from lossprune.pruning import Mask
    from lossprune.pruning.stages import Stages


def do(config: PruneConfig, build: str) -> int:
    """Build the network, prune it, write the folder and print the table.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with the flags, the user's functions, the
            network, its data or the folder, in one sentence.
    """
    if is_checkpoint(build):
        return prune_folder.do(config, Path(build))
    if config.criterion == SPARSE_GPT:
        raise ValueError(
            f"--criterion {SPARSE_GPT} goes block by block: give a folder that save_pretrained "
            "wrote, or call lossprune.prune_by_block"
        )
    from lossprune.channels.compaction import count_live
    from lossprune.commands.evaluation import told_tests
    from lossprune.commands.user_data import UsersData
    from lossprune.commands.user_network import (
        build_network,
        on_device,
        origin_of,
        users_forward,
        users_loss,
    )
    from lossprune.torch_state import seeded, using_threads
    from lossprune.user_code import blaming_users_code

    check_out(config.out, FORMAT, config.overwrite)
    out = config.out.absolute()  # the user's code may change the working folder
    began = time.perf_counter()
    with seeded(config.seed), using_threads(config.threads), blaming_users_code():
        data = UsersData.of(vars(config), config.data_path)
        network = build_network(build, config.weights, data.offered)
        network = on_device(network, config.device)
        functions = {"loss": users_loss(config.loss), "forward": users_forward(config.forward)}
        with shown_progress() as progress:
            origin = origin_of(network)
            before = _tested(network, data, functions, progress)
            mask, stages, pruning = _prune(network, config, data, functions, progress)
            found = count_live(network, mask)
            cost = pruning.cost(mask)
            outcome = outcome_of(network, origin, mask, found, cost)
            mask.apply_(network)
            after = _tested(network, data, functions, progress)
        rows, notes = rows_of(found, pruning.unused), notes_of(found, pruning, outcome)
        if before is not None and after is not None:
            notes.insert(1, told_tests(before, after))
            outcome["test"] = {"before": asdict(before), "after": asdict(after)}
        notes[1:1] = [*([] if cost is None else [cost.told()]), *told_found(stages)]
        notes[1:1] = moves_of(network, stages, config.recalibrate, data.drawn or config.examples)
        record = {
            "format": FORMAT,
            "settings": _settings(config, build),
            **outcome,
            "unused": pruning.unused,
            "skipped": {name: asdict(part) for name, part in pruning.skipped.items()},
            "untraced": found.left_dense,
            "stages": stages,
            "seconds": time.perf_counter() - began,
        }
        write_folder(out, network, mask, record, table_of(rows, notes))
    print_table(
        f"{build}, {mask.criterion}, {counted(len(stages), 'stage')}", COLUMNS, rows, spare=SPARE
    )
    print_lines([*notes, *told_files(config.out, FILES)])
    return EXIT_OK


def _tested(
    network: "nn.Module", data: "UsersData", functions: Mapping[str, Any], progress: Progress
) -> "LossAndError | None":
    if data.test is None:
        return None
    from lossprune.commands.evaluation import loss_and_error

    progress.note("testing")
    return loss_and_error(network, data.test, **functions)


def _prune(
    network: "nn.Module",
    config: PruneConfig,
    data: "UsersData",
    functions: Mapping[str, Any],
    progress: Progress,
) -> "tuple[Mask, list[dict[str, Any]], Stages]":
    """Prune the network, moving its weights where that is asked for."""
    from lossprune.experiment.stage_examples import StageExamples
    from lossprune.pruning import Compensation, prune_by_stage

    pruning = prune_by_stage(
        network,
        config.criterion,
        sparsity=config.sparsity,
        data=data.train,
        examples=data.drawn or config.examples,
        stages=config.stages,
        schedule=config.schedule,
        reg=config.reg,
        average=config.average,
        tolerance=config.tolerance,
        max_examples=config.max_examples,
        seconds=config.seconds,
        validation=data.validation if config.validation or config.has_budget else None,
        max_loss_increase=config.max_loss_increase,
        max_error_increase=config.max_error_increase,
        parameters=config.parameters and listed_names(config.parameters),
        exclude=config.exclude and listed_names(config.exclude),
        scope=config.scope,
        pattern=config.pattern,
        multiply_adds=config.multiply_adds,
        until=_until(network, config),
        estimator=config.estimator,
        seed=config.seed,
        memory=config.memory_bytes,
        origin=_start(config.start),
        compensate=config.compensate and Compensation(finish=config.finish),
        recalibrate=None if config.recalibrate == "no" else config.recalibrate,
        progress=progress,
        on_long=lambda forecast: progress.note(f"note: {forecast.told('--{} {}'.format)}"),
        **functions,
    )
    pruned, stages = pruning.before, []
    total = config.stages_in_all
    progress.advance("stage", 0, total)
    for mask, stage in pruning:
        pruned = mask
        stages.append(stage_dict(stage))
        if isinstance(data.train, StageExamples):
            data.train.stage = stage.stage + 1  # of which the examples are drawn next
        progress.advance("stage", stage.stage, total, stage_in_words(stages[-1]))
    return pruned, stages, pruning


def _until(network: "nn.Module", config: PruneConfig) -> "FileSize | None":
    if config.most_bytes is None:
        return None
    from lossprune.deployment.file_size import FileSize

    return FileSize(network, read_bytes("bytes", config.most_bytes))


def _start(path: Path | None) -> "Mask | None":
    if path is None:
        return None
    from lossprune.pruning import Mask, PruningError

    try:
        return Mask.load(path)
    except (FileNotFoundError, PruningError) as error:
        raise ValueError(f"--start: {error}") from error


def _settings(config: PruneConfig, build: str) -> dict[str, Any]:
    values = asdict(config)
    for name in ("out", "overwrite", "debug", "threads", "data_path"):
        del values[name]
    paths = {name: values[name] and str(values[name]) for name in ("weights", "start")}
    return {"build": build, **values, **paths}
