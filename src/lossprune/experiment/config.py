"""The settings of one run: the single source of its flags, their defaults, help and checks.

Flags keep their published spelling (``--pr``); the code uses the field's names
(``config.sparsity``).  No torch here: a wrong flag is answered at once.
"""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossprune.data import DATA_PATH, DATA_PATH_HELP, DATASETS, MOST_IMAGE_SIZE
from lossprune.flags import (
    MOST_BATCH,
    MOST_EPOCHS,
    MOST_REG,
    check_fraction,
    check_not_negative,
    check_one_of,
    check_one_or_own,
    check_positive,
    check_seed,
    check_threads,
    check_whole,
    declared_flags,
    flag,
    listed_names,
)
from lossprune.networks import NETWORKS
from lossprune.pruning.criteria import CRITERIA
from lossprune.pruning.curvature.estimators import ESTIMATORS, find_estimator
from lossprune.pruning.patterns import final_sparsity, find_pattern
from lossprune.pruning.schedules import MOST_STAGES
from lossprune.pruning.scopes import SCOPES

DEVICES = ("auto", "cpu", "cuda")
TRAININGS = ("auto", "dense", "sparse")
AMPS = ("off", "bf16")
RECALIBRATIONS = ("no", "stages", "end")
LEAST_EXAMPLES = 5  # of a stage that compensates
_LONGEST_NAMES = 80  # of what is named: it is part of a folder's name
_NAMES = re.compile(rf"(?=.{{1,{_LONGEST_NAMES}}}$)[\w.*?!\[\] -]+(,[\w.*?!\[\] -]+)*")


class Unsaid(float):
    """A number that stands where none is given."""


@dataclass(frozen=True)
class RunConfig:
    """Train, prune and fine-tune one network.

    Raises:
        ValueError: a value that its flag does not accept; the message is one sentence that names
            the flag, the value and what is accepted.

    >>> RunConfig(arch="MLP", sparsity=0.98847, stages=14, exponential=True).name
    'arch=MLP,dec=1.0,dec_every=1,exp=True,l2=0.0005,lr=0.01,model_0=None,nepochs=200,nex=1000,pe=0,pi=14,pm=MP,pr=0.98847,reg=0.0,seed=1111'
    """

    arch: str = flag(
        "VGG11",
        "arch",
        f"network: {', '.join(NETWORKS)}; or MODULE:FUNCTION that builds your own",
        "always",
    )
    dataset: str | None = flag(
        None,
        "dataset",
        f"data set: {', '.join(DATASETS)}, or MODULE:FUNCTION that loads your own; if not given, "
        "mnist for MLP and cifar10 for the others",
        "changed",
    )
    image_size: int = flag(
        0, "image_size", "height and width of inputs, for imagenet; 0: 224", "changed"
    )
    sparsity: float = flag(
        Unsaid(0.956),
        "pr",
        "fraction of the weights to remove, in [0, 1); with --pattern what that says",
        "always",
    )
    criterion: str = flag(
        "MP",
        "pm",
        f"pruning criterion: {', '.join(CRITERIA)}; or MODULE:NAME of a lossprune.Criterion",
        "always",
    )
    stages: int = flag(1, "pi", "number of pruning stages π", "always")
    exponential: bool = flag(
        False, "exp", "remove the same fraction of what remains at each stage", "always"
    )
    prune_epoch: int = flag(
        0, "pe", "prune after this many epochs: 0 at the start, -1 never", "always"
    )
    reg: float = flag(0.0, "reg", "step-size penalty λ on every saliency", "always")
    examples: int = flag(1000, "nex", "training examples to measure at each stage", "always")
    start: Path | None = flag(
        None,
        "model_0",
        "network to start from, such as a best_model.pt, or what lossprune prune wrote, of which "
        "removed weights stay removed; none: a new one",
        "always",
    )
    estimator: str = flag(
        "exact",
        "estimator",
        f"of the curvature: {', '.join(ESTIMATORS)}; a value may follow, as in monte-carlo:20",
        "changed",
    )
    scope: str = flag("global", "scope", f"which weights compete: {', '.join(SCOPES)}", "asked")
    pattern: str = flag(
        "unstructured", "pattern", "unstructured, or N:M such as 2:4, without --pr", "asked"
    )
    parameters: str = flag(
        "all",
        "parameters",
        "which weights to prune: all, or names or patterns, joined by commas",
        "asked",
    )
    exclude: str = flag("none", "exclude", "which of them not, in the same way, or none", "asked")
    compensate: bool = flag(
        False,
        "compensate",
        "each stage also moves the weights that are left to where a second-order model has them",
        "asked",
    )
    finish: int = flag(
        0, "finish", "with --compensate: stages more that move weights at the final mask", "asked"
    )
    recalibrate: str = flag(
        "no",
        "recalibrate",
        "statistics of batch normalisation anew at the mask: no, stages (after each) or end",
        "asked",
    )
    epochs: int = flag(200, "nepochs", "epochs in all", "always")
    lr: float = flag(0.01, "lr", "learning rate", "always")
    decay: float = flag(1.0, "dec", "factor on the learning rate every dec_every epochs", "always")
    decay_every: int = flag(1, "dec_every", "epochs between two decays", "always")
    batch_size: int = flag(100, "batch_size", "training examples a step", "changed")
    l2: float = flag(0.0005, "l2", "weight decay on every parameter", "always")
    train: str = flag(
        "auto",
        "train",
        "fine-tuning: dense, sparse (over the surviving weights alone), or auto, the faster one",
        "changed",
    )
    amp: str = flag(
        "off",
        "amp",
        "off, or bf16: training and evaluation partly in bfloat16; pruning stays in float32",
        "changed",
    )
    compiled: bool = flag(
        False, "compile", "training and evaluation through torch.compile", "changed"
    )
    seed: int = flag(1111, "seed", "seed of split, network, batches and examples", "always")
    path: Path = flag(Path("results"), "path", "folder of all results")
    data_path: Path = flag(DATA_PATH, "data_path", DATA_PATH_HELP)
    mirror: str | None = flag(None, "mirror", "base URL to download a missing data set from")
    device: str = flag("auto", "device", "auto, cpu or cuda; auto takes CUDA where there is one")
    threads: int | None = flag(None, "threads", "CPU threads; if not given, torch's own choice")
    num_workers: int = flag(
        4, "num_workers", "accepted for the published commands; data are held as tensors"
    )
    debug: bool = flag(False, "debug", "show the traceback of an error")

    def __post_init__(self) -> None:
        check_one_or_own("arch", self.arch, NETWORKS, "MODULE:FUNCTION")
        if self.dataset is not None:
            check_one_or_own("dataset", self.dataset, DATASETS, "MODULE:FUNCTION")
        elif implied_dataset(self.arch) is None:
            raise ValueError(
                f"--dataset is missing: a network of your own, --arch {self.arch}, implies none"
            )
        check_one_or_own("pm", self.criterion, CRITERIA, "MODULE:NAME")
        check_one_of("device", self.device, DEVICES)
        check_one_of("train", self.train, TRAININGS)
        check_one_of("amp", self.amp, AMPS)
        check_one_of("estimator", self.estimator.partition(":")[0], ESTIMATORS)
        try:
            find_estimator(self.estimator)
        except ValueError as error:
            raise ValueError(f"--estimator {self.estimator}: {error}") from None
        check_one_of("scope", self.scope, SCOPES)
        self._settle_sparsity()
        for name in ("parameters", "exclude"):
            object.__setattr__(self, name, _checked_names(name, getattr(self, name)))
        check_whole("pi", self.stages, 1, MOST_STAGES)
        check_whole("pe", self.prune_epoch, -1, MOST_EPOCHS)
        check_not_negative("reg", self.reg, MOST_REG)
        check_whole("nex", self.examples, 1)  # the data set says how many there are
        check_finish(self.finish, compensate=self.compensate)
        if self.compensate and self.examples < LEAST_EXAMPLES:  # not only after all training
            raise ValueError(
                f"--nex {self.examples} with --compensate: a fifth of the examples choose the "
                f"damping, so it takes {LEAST_EXAMPLES} at least"
            )
        check_one_of("recalibrate", self.recalibrate, RECALIBRATIONS)
        check_whole("nepochs", self.epochs, 0, MOST_EPOCHS)
        check_positive("lr", self.lr)
        check_positive("dec", self.decay)
        check_whole("dec_every", self.decay_every, 1)
        check_whole("image_size", self.image_size, 0, MOST_IMAGE_SIZE)
        check_whole("batch_size", self.batch_size, 1, MOST_BATCH)
        check_not_negative("l2", self.l2)
        check_seed("seed", self.seed)
        check_whole("num_workers", self.num_workers, 0)
        check_threads(self.threads)
        if self.prune_epoch > 0 and self.epochs <= self.prune_epoch:
            raise ValueError(
                f"--pe {self.prune_epoch} with --nepochs {self.epochs}: pruning would never "
                "happen; --nepochs must be greater than --pe"
            )
        if self.train == "sparse" and not self.plain:
            given = "--compile" if self.amp == "off" else f"--amp {self.amp}"
            raise ValueError(
                f"--train sparse with {given}: sparse training computes in float32 by its own "
                "kernels; give --train dense or auto"
            )

    def _settle_sparsity(self) -> None:
        """Check sparsity and pattern together; of one alone, take the other from it."""
        check_fraction("pr", self.sparsity)
        asked = None if isinstance(self.sparsity, Unsaid) else self.sparsity
        try:
            pattern = find_pattern(self.pattern)
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        try:
            final_sparsity(0.0 if pattern is None else asked, pattern)
        except ValueError:
            assert pattern is not None
            raise ValueError(
                f"--pr {asked} with --pattern {pattern}: such a pattern removes "
                f"{pattern.sparsity:g} of the weights; leave --pr out"
            ) from None
        settled = float(self.sparsity) if pattern is None else pattern.sparsity
        object.__setattr__(self, "sparsity", settled)

    @property
    def plain(self) -> bool:
        """Whether networks are computed in float32, by torch as it is."""
        return self.amp == "off" and not self.compiled

    @property
    def dataset_name(self) -> str:
        """The data set: the one asked for, or else the one that the network implies."""
        return self.dataset or implied_dataset(self.arch) or ""

    @property
    def schedule(self) -> str:
        """The name of the pruning schedule, a key of :data:`lossprune.pruning.SCHEDULES`."""
        return "exponential" if self.exponential else "linear"

    @property
    def stages_in_all(self) -> int:
        """How many stages there are with those at the final mask."""
        return self.stages + self.finish

    @property
    def prunes(self) -> bool:
        """Whether the run prunes at all."""
        return self.prune_epoch >= 0

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the result, by flag: the protocol's flags, data set and estimator.

        Later flags are there only where they are asked for: records of the protocol stay the same.
        """
        values = {}
        for name, declared in sorted(declared_flags(type(self)).items()):
            value = getattr(self, declared.field)
            left_out = declared.named == "asked" and value == declared.default
            if declared.named != "never" and not left_out:
                values[name] = value
        has_start = None if self.start is None else True
        return {**values, "model_0": has_start, "dataset": self.dataset_name}

    @property
    def name(self) -> str:
        """The run folder's name: the protocol's flags, sorted, and others where they differ."""
        parts = self.settings
        defaults = {"dataset": implied_dataset(self.arch)}
        for name, declared in declared_flags(type(self)).items():
            default = defaults.get(name, declared.default)
            if declared.named == "changed" and parts[name] == default:
                del parts[name]
        # Commas part the flags.
        told = {name: str(value).replace(",", "+") for name, value in parts.items()}
        return ",".join(f"{name}={value}" for name, value in told.items())

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.path / self.name


def check_finish(finish: int, *, compensate: bool) -> None:
    """Check ``--finish``, which says how a compensation ends."""
    check_whole("finish", finish, 0, MOST_STAGES)
    if finish and not compensate:
        raise ValueError(
            f"--finish {finish} without --compensate: these stages remove nothing, they only move "
            "weights; give --compensate as well"
        )


def _checked_names(flag: str, names: str) -> str:
    """Return the names without spaces at commas; they become part of a folder's name.

    >>> _checked_names("exclude", "fc1, fc2*")
    'fc1,fc2*'
    """
    joined = ",".join(listed_names(names))
    if not _NAMES.fullmatch(joined):
        raise ValueError(
            f"--{flag} must be names of parameters or modules, or patterns of them, joined by "
            f"commas, of at most {_LONGEST_NAMES} signs, got {names!r}"
        )
    return joined


def implied_dataset(arch: str) -> str | None:
    """Return the data set of a network where none is named; None: it has to be."""
    if ":" in arch:
        return None
    return "mnist" if arch == "MLP" else "cifar10"
