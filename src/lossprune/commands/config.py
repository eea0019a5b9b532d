"""The flags of ``lossprune prune`` and ``lossprune deploy``."""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lossprune.flags import (
    MOST_REG,
    check,
    check_fraction,
    check_not_negative,
    check_positive,
    check_seed,
    check_threads,
    check_whole,
    did_you_mean,
    flag,
)
from lossprune.pruning.criteria import CRITERIA
from lossprune.pruning.curvature.estimators import ESTIMATORS
from lossprune.pruning.schedules import MOST_STAGES, SCHEDULES
from lossprune.pruning.scopes import SCOPES

_MOST_SECONDS = 3600.0
_MOST_TIMED = 65_536  # images in a batch


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
        _one_of("criterion", self.criterion, CRITERIA)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("scope", self.scope, SCOPES)
        if self.sparsity is None and self.pattern == "unstructured":
            raise ValueError("--sparsity is missing: the fraction of the weights to remove")
        if self.sparsity is not None:
            check_fraction("sparsity", self.sparsity)
        check_not_negative("reg", self.reg, MOST_REG)
        check_seed("seed", self.seed)
        check_whole("stages", self.stages, 1, MOST_STAGES)
        check_whole("examples", self.examples, 1)
        check_threads(self.threads)


@dataclass(frozen=True)
class DeployConfig:
    """Make the small and fast forms of a pruned network, and compare them in a table.

    RUN_FOLDER is that of a finished run, or what ``lossprune prune`` wrote.

    Raises:
        ValueError: a value that its flag does not accept.
    """

    out: Path = flag(Path("deployed"), "out", "folder to write into")
    data_path: Path = flag(Path("data"), "data_path", "folder of the data sets")
    mirror: str | None = flag(None, "mirror", "base URL to download a missing data set from")
    values: str = flag("exact", "values", "of kept weights in the file: exact or float16")
    batch: str = flag("1,100", "batch", "batch sizes to time, such as 1,100")
    seconds: float = flag(2.0, "seconds", "how long to time at each batch size")
    threads: int | None = flag(None, "threads", "CPU threads; if not given, torch's own choice")
    overwrite: bool = flag(False, "overwrite", "replace what an earlier deploy wrote there")
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        _one_of("values", self.values, ("exact", "float16"))
        check_positive("seconds", self.seconds, _MOST_SECONDS)
        check_threads(self.threads)
        _ = self.batch_sizes

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes to time."""
        try:
            sizes = tuple(int(size) for size in self.batch.split(","))
        except ValueError:
            sizes = (0,)
        good = min(sizes) >= 1 and max(sizes) <= _MOST_TIMED
        check("batch", self.batch, good, f"whole numbers from 1 to {_MOST_TIMED:,}, such as 1,100")
        return sizes


def _one_of(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"--{name} must be one of {', '.join(choices)}, got {value!r}"
            + did_you_mean(value, choices)
        )
