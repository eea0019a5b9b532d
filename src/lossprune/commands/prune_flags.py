"""The flags of ``lossprune prune``, and what they need of one another."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lossprune.data import DATA_PATH, DATA_PATH_HELP, DATASETS
from lossprune.experiment.config import DEVICES
from lossprune.experiment.flags_together import check_finish
from lossprune.experiment.pruning_flags import RECALIBRATIONS
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
    read_bytes,
)
from lossprune.pruning.costs import share_gone
from lossprune.pruning.criteria import CRITERIA, SPARSE_GPT
from lossprune.pruning.curvature.estimators import ESTIMATORS
from lossprune.pruning.schedules import MOST_STAGES, SCHEDULES
from lossprune.pruning.scopes import SCOPES


@dataclass(frozen=True)
class PruneConfig:
    """Prune a network of your own: MODULE:BUILD makes it, or save_pretrained wrote the FOLDER.

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
    criterion: str = flag(
        "QM", "criterion", f"one of {', '.join(CRITERIA)}; of a FOLDER {SPARSE_GPT}, Wanda or MP"
    )
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
        "share kept of what earlier stages measured, in [0, 1); LM, QM: 0.9 with auto or budget",
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
    scope: str | None = flag(
        None, "scope", f"which weights compete: {', '.join(SCOPES)}; the criterion's default"
    )
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
        check_one_of("criterion", self.criterion, (*CRITERIA, SPARSE_GPT))
        check_one_of("schedule", self.schedule, SCHEDULES)
        if self.scope is not None:
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
        priced = self.scope is not None and SCOPES[self.scope].price is not None
        counted = self.multiply_adds is not None or priced
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
