"""``lossprune sensitivity``: what each layer of a network of one's own costs alone."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossprune.commands import EXIT_OK
from lossprune.commands.output import check_out, told_files
from lossprune.commands.sensitivity_folder import (
    FILES,
    FORMAT,
    SPARE,
    notes_of,
    tables_of,
    write_folder,
)
from lossprune.data import DATA_PATH, DATA_PATH_HELP, DATASETS
from lossprune.experiment.config import DEVICES
from lossprune.flags import (
    MOST_REG,
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
from lossprune.pruning.criteria import CRITERIA
from lossprune.pruning.curvature.estimators import ESTIMATORS
from lossprune.text_table import print_lines, print_table

if TYPE_CHECKING:
    from torch import nn

    from lossprune.commands.user_data import UsersData
    from lossprune.pruning import Sensitivity


@dataclass(frozen=True)
class SensitivityConfig:
    """Prune each layer of a network of your own alone, and tell what the loss does.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    data: str | None = flag(
        None, "data", "MODULE:FUNCTION that returns batches of (inputs, targets)"
    )
    dataset: str | None = flag(
        None, "dataset", f"instead of --data: {', '.join(DATASETS)}, or MODULE:FUNCTION as for "
        "lossprune run"
    )  # fmt: skip
    data_path: Path = flag(DATA_PATH, "data_path", DATA_PATH_HELP)
    validation: str | None = flag(
        None,
        "validation",
        "MODULE:FUNCTION of batches to measure losses on, in the place of the examples pruned on",
    )
    criterion: str = flag("QM", "criterion", f"one of {', '.join(CRITERIA)}")
    sparsities: str | None = flag(
        None, "sparsities", "of each layer, rising, such as 0.5,0.9; if not given, six up to 0.98"
    )
    max_loss_increase: float | None = flag(
        None,
        "max_loss_increase",
        "tell up to which sparsity each layer alone raises the loss by no more",
    )
    reg: float | None = flag(
        None, "reg", "step-size penalty λ on every saliency; the criterion's default"
    )
    examples: int | None = flag(None, "examples", "examples to read; none: all")
    loss: str = flag("cross_entropy", "loss", "name of a loss, or MODULE:LOSS of your own")
    forward: str | None = flag(
        None, "forward", "MODULE:FUNCTION of (model, batch) that returns (outputs, targets)"
    )
    parameters: str | None = flag(
        None, "parameters", "which weights are layers here: names or patterns, joined by commas"
    )
    exclude: str | None = flag(None, "exclude", "which of them not, in the same way")
    pattern: str = flag("unstructured", "pattern", "unstructured, or N:M such as 2:4")
    estimator: str | None = flag(
        "exact",
        "estimator",
        f"of the curvature: {', '.join(ESTIMATORS)}; None measures none and predicts nothing",
    )
    weights: Path | None = flag(
        None, "weights", "state dict (.pt), safetensors or sparse file to load into the network"
    )
    seed: int = flag(1111, "seed", "of torch while the network is built, and of what is drawn")
    device: str = flag("auto", "device", "auto, cpu or cuda; auto takes CUDA where there is one")
    memory: str | None = flag(
        None, "memory", "bytes that measuring may take at once, such as 2G; if not given, 256M on "
        "a CPU and 4G on a GPU"
    )  # fmt: skip
    threads: int | None = flag(None, "threads", "CPU threads; if not given, torch's own choice")
    out: Path = flag(Path("sensitivity"), "out", "folder to write into")
    overwrite: bool = flag(False, "overwrite", "replace what an earlier sensitivity wrote there")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_one_of("criterion", self.criterion, CRITERIA)
        _ = self.steps
        if self.max_loss_increase is not None:
            check_not_negative("max_loss_increase", self.max_loss_increase)
        if self.reg is not None:
            check_not_negative("reg", self.reg, MOST_REG)
        check_seed("seed", self.seed)
        check_whole("examples", self.examples, 1)
        check_threads(self.threads)
        check_one_of("device", self.device, DEVICES)
        _ = self.memory_bytes
        if self.data is self.dataset is None:
            raise ValueError("examples are needed to measure the loss on: give --data or --dataset")
        if self.dataset is not None:
            check_one_or_own("dataset", self.dataset, DATASETS, "MODULE:FUNCTION")
            if self.data is not None:
                raise ValueError("--dataset is given instead of --data")

    @property
    def steps(self) -> list[float] | None:
        """What ``--sparsities`` says, as numbers."""
        if self.sparsities is None:
            return None
        try:
            steps = [float(word) for word in self.sparsities.split(",")]
        except ValueError:
            steps = []
        if not steps or not all(low < high for low, high in pairwise([0.0, *steps, 1.0])):
            raise ValueError(
                "--sparsities must be rising numbers between 0 and 1, joined by commas, such as "
                f"0.5,0.9, got {self.sparsities!r}"
            )
        return steps

    @property
    def memory_bytes(self) -> int | None:
        """What ``--memory`` says, as a number."""
        return None if self.memory is None else read_bytes("memory", self.memory)


def do(config: SensitivityConfig, build: str) -> int:
    """Build the network, prune its layers one at a time, write the folder and print the tables.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with the flags, the user's functions, the
            network, its data or the folder, in one sentence.
    """
    from lossprune.commands.user_data import UsersData
    from lossprune.commands.user_network import build_network, on_device, origin_of
    from lossprune.experiment.environment import environment_of
    from lossprune.torch_state import seeded, using_threads
    from lossprune.user_code import blaming_users_code

    check_out(config.out, FORMAT, config.overwrite)
    out = config.out.absolute()  # the user's code may change the working folder
    began = time.perf_counter()
    with seeded(config.seed), using_threads(config.threads), blaming_users_code():
        data = UsersData.of(vars(config), config.data_path)
        network = build_network(build, config.weights, data.offered)
        network = on_device(network, config.device)
        guesses: list[str] = []
        with shown_progress() as progress:
            found = _scanned(network, config, data, guesses, progress)
        record = {
            "format": FORMAT,
            "settings": _settings(config, build),
            "environment": environment_of(next(network.parameters()).device),
            "network": origin_of(network),
            **found.to_dict(),
            "seconds": time.perf_counter() - began,
        }
    tables = tables_of(found, config.max_loss_increase)
    notes = notes_of(found, guesses)
    write_folder(out, found, record, tables, notes, build, config.max_loss_increase)
    for title, columns, rows in tables:
        print_table(title, columns, rows, spare=SPARE)
        print()
    print_lines([*notes, *told_files(config.out, FILES)])
    return EXIT_OK


def _scanned(
    network: "nn.Module",
    config: SensitivityConfig,
    data: "UsersData",
    guesses: list[str],
    progress: Progress,
) -> "Sensitivity":
    from lossprune.commands.user_data import batches_of
    from lossprune.commands.user_network import users_forward, users_loss
    from lossprune.pruning.layer_scan import scan_layers

    return scan_layers(
        network,
        data.train,
        config.criterion,
        sparsities=config.steps,
        examples=config.examples,
        reg=config.reg,
        parameters=config.parameters and listed_names(config.parameters),
        exclude=config.exclude and listed_names(config.exclude),
        pattern=config.pattern,
        loss=users_loss(config.loss),
        forward=users_forward(config.forward),
        estimator=config.estimator,
        memory=config.memory_bytes,
        seed=config.seed,
        validation=batches_of(config.validation, "--validation"),
        progress=progress,
        on_long=lambda forecast: progress.note(f"note: {forecast.told('--{} {}'.format)}"),
        on_guess=guesses.append,
    )


def _settings(config: SensitivityConfig, build: str) -> dict[str, Any]:
    values = asdict(config)
    for name in ("out", "overwrite", "debug", "threads", "data_path"):
        del values[name]
    weights = None if config.weights is None else str(config.weights)
    return {"build": build, **values, "weights": weights}
