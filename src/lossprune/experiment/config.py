"""The settings of one run: the single source of its flags, their defaults, help and checks.

Flags keep their published spelling (``--pr``); the code uses the field's names
(``config.sparsity``).  No torch here: a wrong flag is answered at once.
"""

# ruff: noqa: RUF009 (flag() makes the field, it is not a default that instances would share)

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lossprune.data import DATA_PATH, DATA_PATH_HELP, DATASETS, MOST_IMAGE_SIZE
from lossprune.experiment.pruning_flags import PruningFlags
from lossprune.flags import (
    MOST_BATCH,
    MOST_EPOCHS,
    check_not_negative,
    check_one_of,
    check_one_or_own,
    check_positive,
    check_seed,
    check_threads,
    check_whole,
    declared_flags,
    flag,
)
from lossprune.networks import NETWORKS

DEVICES = ("auto", "cpu", "cuda")
TRAININGS = ("auto", "dense", "sparse")
AMPS = ("off", "bf16")
_LONGEST_NAME, _SEED = 240, 30  # bytes, of which the seed takes some; file systems take 255


@dataclass(frozen=True)
class _NetworkFlags:
    """Which network and data set a run is of."""

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


@dataclass(frozen=True)
class RunConfig(PruningFlags, _NetworkFlags):  # flags of the last base come first
    """Train, prune and fine-tune one network.

    Raises:
        ValueError: a value that its flag does not accept; the message is one sentence that names
            the flag, the value and what is accepted.

    >>> RunConfig(arch="MLP", sparsity=0.98847, stages=14, exponential=True).name
    'arch=MLP,dec=1.0,dec_every=1,exp=True,l2=0.0005,lr=0.01,model_0=None,nepochs=200,nex=1000,pe=0,pi=14,pm=MP,pr=0.98847,reg=0.0,seed=1111'
    """

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
        check_one_of("device", self.device, DEVICES)
        check_one_of("train", self.train, TRAININGS)
        check_one_of("amp", self.amp, AMPS)
        super().__post_init__()
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

    @property
    def plain(self) -> bool:
        """Whether networks are computed in float32, by torch as it is."""
        return self.amp == "off" and not self.compiled

    @property
    def dataset_name(self) -> str:
        """The data set: the one asked for, or else the one that the network implies."""
        return self.dataset or implied_dataset(self.arch) or ""

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
        return _fitting([f"{name}={value}" for name, value in told.items()])

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.path / self.name


def _fitting(parts: list[str]) -> str:
    """Return a folder's name of the parts: of too many, the first ones, a hash of all, the seed.

    But for the seed they are the same for every one.
    """
    whole = ",".join(parts)
    if len(whole.encode()) <= _LONGEST_NAME:
        return whole
    (seed,) = [part for part in parts if part.startswith("seed=")]
    others = [part for part in parts if part != seed]
    told = "sha256=" + sha256(",".join(others).encode()).hexdigest()[:16]
    while len(",".join([*others, told]).encode()) > _LONGEST_NAME - _SEED:
        others.pop()
    return ",".join([*others, seed, told])


def implied_dataset(arch: str) -> str | None:
    """Return the data set of a network where none is named; None: it has to be."""
    if ":" in arch:
        return None
    return "mnist" if arch == "MLP" else "cifar10"
