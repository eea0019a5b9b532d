"""``lossprune prune``: prune a network of one's own and write what came of it."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lossprune.commands import EXIT_OK
from lossprune.commands.output import check_out, told_files
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
from lossprune.data import DATA_PATH, DATA_PATH_HELP, DATASETS
from lossprune.experiment.config import DEVICES
from lossprune.experiment.flags_together import check_finish
from lossprune.experiment.log import stage_in_words, told_found
from lossprune.experiment.pruning_flags import RECALIBRATIONS
from lossprune.experiment.stage_dict import stage_dict
from lossprune.flags import (
    AUTO,
    MOST_REG,
    check_auto,
    check_fraction,
    check_not_negative,
    check_one_of,
    check_one_or_own,
    check_seed,
    check_threads,
    check_whole,
    flag,
    listed_names,
    read_bytes,
)
from lossprune.progress import Progress, shown_progress
from lossprune.pruning.costs import share_gone
from lossprune.pruning.criteria import CRITERIA
from lossprune.pruning.curvature.estimators import ESTIMATORS
from lossprune.pruning.names import counted
from lossprune.pruning.schedules import MOST_STAGES, SCHEDULES
from lossprune.pruning.scopes import SCOPES
from lossprune.text_table import print_lines, print_table

if TYPE_CHECKING:
    from torch import nn

    from lossprune.commands.evaluation import LossAndError
    from lossprune.commands.user_data import UsersData
    from lossprune.deployment.file_size import FileSize
    from lossprune.pruning import Mask
    from lossprune.pruning.stages import Stages


@dataclass(frozen=True)
class PruneConfig:
    """Prune a network of your own: MODULE:BUILD makes it.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    data: str | None = flag(
        None, "data", "MODULE:FUNCTION that returns batches of (inputs, targets); MP needs none"
    )
    dataset: str | None = flag(
        None, "dataset", f"instead of --data and --test: {', '.join(DATASETS)}, or MODULE:FUNCTION "
        "as for lossprune run"
    )  # fmt: skip
    data_path: Path = flag(DATA_PATH, "data_path", DATA_PATH_HELP)
    sparsity: float | None = flag(None, "sparsity", "fraction of the weights to remove, in [0, 1)")
    criterion: str = flag("QM", "criterion", f"one of {', '.join(CRITERIA)}")
    stages: int | Literal["auto"] | None = flag(
        None,
        "stages",
        "number of pruning stages π; the criterion's default; auto: as far each as its model holds",
    )
    schedule: str = flag("exponential", "schedule", f"one of {', '.join(SCHEDULES)}")
    reg: float | Literal["auto"] | None = flag(
        None,
        "reg",
        "step-size penalty λ on every saliency; the criterion's default; auto: found at each stage",
    )
    average: float | None = flag(
        None,
        "average",
        "share kept of what earlier stages measured, in [0, 1); LM, QM: 0.9 with an auto; else 0",
    )
    tolerance: float | None = flag(
        None, "tolerance", "with --stages auto: nats that the model may be off; 0.1"
    )
    max_examples: int | None = flag(
        None, "max_examples", "with --stages auto: the most that all stages read together"
    )
    seconds: float | None = flag(
        None, "seconds", "with --stages auto: about how long all stages may take"
    )
    max_loss_increase: float | None = flag(
        None, "max_loss_increase", "end where the validation loss has risen by this"
    )
    max_error_increase: float | None = flag(
        None, "max_error_increase", "end where the validation error has risen by so many points"
    )
    validation: str | None = flag(
        None,
        "validation",
        "MODULE:FUNCTION of batches to judge each stage on; --dataset has its own",
    )
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
    multiply_adds: float | None = flag(
        None,
        "multiply_adds",
        "instead of a sparsity: the share of the multiply-adds that is left, in (0, 1]",
    )
    most_bytes: str | None = flag(
        None,
        "bytes",
        "instead of a sparsity: how large network.safetensors may be, such as 100K",
    )
    pattern: str = flag("unstructured", "pattern", "unstructured, or N:M such as 2:4")
    estimator: str = flag("exact", "estimator", f"of the curvature: {', '.join(ESTIMATORS)}")
    compensate: bool = flag(
        False,
        "compensate",
        "each stage also moves the weights that are left to where a second-order model has them",
    )
    finish: int = flag(
        0, "finish", "with --compensate: stages more that move weights at the final mask"
    )
    recalibrate: str = flag(
        "no",
        "recalibrate",
        "statistics of batch normalisation anew at the mask: no, stages (after each) or end",
    )
    test: str | None = flag(
        None, "test", "MODULE:FUNCTION of batches to test on, before and after pruning"
    )
    weights: Path | None = flag(
        None, "weights", "state dict (.pt), safetensors or sparse file to load into the network"
    )
    start: Path | None = flag(
        None, "start", "mask of an earlier prune (mask.safetensors) to go on from"
    )
    seed: int = flag(1111, "seed", "of torch while the network is built, and of each stage")
    device: str = flag("auto", "device", "auto, cpu or cuda; auto takes CUDA where there is one")
    memory: str | None = flag(
        None, "memory", "bytes that measuring may take at once, such as 2G; if not given, 256M on "
        "a CPU and 4G on a GPU"
    )  # fmt: skip
    threads: int | None = flag(None, "threads", "CPU threads; if not given, torch's own choice")
    out: Path = flag(Path("pruned"), "out", "folder to write into")
    overwrite: bool = flag(False, "overwrite", "replace what an earlier prune wrote there")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_one_of("criterion", self.criterion, CRITERIA)
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_one_of("scope", self.scope, SCOPES)
        self._check_target()
        if self.sparsity is not None:
            check_fraction("sparsity", self.sparsity)
        check_auto("reg", self.reg, "a number of at least 0")
        check_auto("stages", self.stages, "a whole number")
        if self.reg is not None and self.reg != AUTO:
            check_not_negative("reg", self.reg, MOST_REG)
        check_seed("seed", self.seed)
        if self.stages != AUTO:
            check_whole("stages", self.stages, 1, MOST_STAGES)
        check_whole("examples", self.examples, 1)
        check_finish(self.finish, compensate=self.compensate)
        check_one_of("recalibrate", self.recalibrate, RECALIBRATIONS)
        check_threads(self.threads)
        check_one_of("device", self.device, DEVICES)
        _ = self.memory_bytes
        if self.dataset is not None:
            check_one_or_own("dataset", self.dataset, DATASETS, "MODULE:FUNCTION")
            if self.data is not None or self.test is not None or self.validation is not None:
                raise ValueError("--dataset is given instead of --data, --test and --validation")
        if self.data is self.dataset is None and (self.compensate or self.recalibrate != "no"):
            given = "--compensate" if self.compensate else f"--recalibrate {self.recalibrate}"
            raise ValueError(f"{given} needs examples: give --data or --dataset")

    def _check_target(self) -> None:
        """Check what says how far the pruning goes."""
        if self.most_bytes is not None:
            read_bytes("bytes", self.most_bytes)
            others = {"sparsity": self.sparsity, "multiply_adds": self.multiply_adds}
            for name, value in others.items():
                if value is not None:
                    raise ValueError(f"--bytes is given instead of --{name}")
        elif self.multiply_adds is not None:
            share_gone("--multiply_adds", self.multiply_adds)
            if self.sparsity is not None or self.pattern != "unstructured":
                raise ValueError("--multiply_adds is given instead of --sparsity and --pattern")
        elif self.sparsity is None and self.pattern == "unstructured" and not self.has_budget:
            raise ValueError(
                "--sparsity is missing: the fraction of the weights to remove; or give "
                "--multiply_adds, the share of them that is left, --bytes, the size of the file, "
                "or --max_loss_increase or --max_error_increase, what the pruning may cost"
            )
        counted = self.multiply_adds is not None or SCOPES[self.scope].price is not None
        if counted and self.data is self.dataset is None:
            given = "--multiply_adds" if self.multiply_adds is not None else f"--scope {self.scope}"
            raise ValueError(f"{given} counts on an example: give --data or --dataset")

    @property
    def has_budget(self) -> bool:
        """Whether what the pruning costs ends it."""
        return self.max_loss_increase is not None or self.max_error_increase is not None

    @property
    def stages_in_all(self) -> int | None:
        """How many stages there are; None: it is found on the way."""
        ends = self.sparsity is not None or self.multiply_adds is not None
        if self.stages == AUTO or not (ends or self.pattern != "unstructured"):
            return None
        return (self.stages or CRITERIA[self.criterion].stages) + self.finish

    @property
    def memory_bytes(self) -> int | None:
        """What ``--memory`` says, as a number."""
        return None if self.memory is None else read_bytes("memory", self.memory)


def do(config: PruneConfig, build: str) -> int:
    """Build the network, prune it, write the folder and print the table.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with the flags, the user's functions, the
            network, its data or the folder, in one sentence.
    """
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
