"""All that a run needs before it may write a byte: device, data, network, and their checks."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lossprune.data import Dataset, load
from lossprune.experiment.asked_pruning import check_pruning
from lossprune.experiment.config import RunConfig
from lossprune.experiment.environment import choose_device, environment_of
from lossprune.experiment.network_file import read_network, weights_sha256
from lossprune.experiment.own_code import build_network, code_of
from lossprune.experiment.ranks import current
from lossprune.experiment.record import RunRecord, Start
from lossprune.experiment.start import begin_
from lossprune.kernels.compiler import compiler_available
from lossprune.pruning import Mask
from lossprune.training.choice import check_sparse
from lossprune.training.precision import check_compiler

T = TypeVar("T")


@dataclass(frozen=True)
class PreparedRun:
    """A run ready to begin.

    Attributes:
        config, device, dataset, network: what is to be done, and with what.
        start: the network it begins from.
        mask: of the weights that the network has removed already; None: it is dense.
        environment: versions and hardware.
        own: SHA-256 of the user's own code and data, as :class:`RunRecord` has them.
        note: what to tell of the start network, if anything.
    """

    config: RunConfig
    device: torch.device
    dataset: Dataset
    network: nn.Module
    start: Start
    mask: Mask | None
    environment: Mapping[str, Any]
    own: Mapping[str, str]
    note: str | None = None

    @property
    def about_networks(self) -> dict[str, Any]:
        """The metadata of the run's networks, as files, that no epoch changes."""
        return {
            "architecture": self.config.arch,
            "dataset": self.config.dataset_name,
            "shape": list(self.dataset.shape),
            "classes": list(self.dataset.classes),
        }


class Cache:
    """What runs in one process share: the values last used, a limited number of each kind.

    Without a limit it keeps none.

    Values are shared, so nobody may change them; a key holds all that determines its value.

    >>> cache = Cache({"square": 1})
    >>> cache.get("square", 3, lambda: 9), cache.get("square", 3, lambda: 0)
    (9, 9)
    """

    def __init__(self, limits: Mapping[str, int] | None = None) -> None:
        self._limits = dict(limits or {})
        self._kept: dict[str, OrderedDict[Hashable, Any]] = {}

    def get(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value kept for this key, or make it and keep it."""
        limit = self._limits.get(kind, 0)
        kept = self._kept.setdefault(kind, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
        if limit and len(kept) >= limit:
            kept.popitem(last=False)  # before making the next: they may be large
        value = make()
        if limit:
            kept[key] = value
        return value


def prepare(
    config: RunConfig, unfinished: RunRecord | None = None, cache: Cache | None = None
) -> PreparedRun:
    """Load data and network and check what flags alone cannot tell.

    Args:
        config: the run.
        unfinished: the record of the same run, if it was interrupted: it goes on where it ran.
        cache: keeps the data set and the start network for the next run.

    Raises:
        ValueError: no CUDA; wrong data; a network that does not fit them or ``--model_0``; a
            sparsity that leaves nothing; ``--train sparse``, ``--amp`` or ``--compile`` where that
            cannot be done.
        FileNotFoundError: ``--model_0`` or the data set is not there.
    """
    device = choose_device(config.device, unfinished)
    cache = cache or Cache()
    dataset, data = cache.get(
        "dataset", (*dataset_key(config), str(device)), lambda: _load(config, device)
    )
    network = build_network(config, dataset)
    begun = begin_(network, config.arch, config.start, partial(_read_kept, cache))
    check_pruning(config, dataset, network, begun.mask)
    network = network.to(device)
    _check_training(config, dataset, network, begun.mask)
    _check_forward(config, device)
    return PreparedRun(
        config=config,
        device=device,
        dataset=dataset,
        network=network,
        start=begun.start,
        mask=None if begun.mask is None else begun.mask.to(device),
        environment=environment_of(device),
        note=begun.note,
        own={**data, **code_of(config)},
    )


def _load(config: RunConfig, device: torch.device) -> tuple[Dataset, dict[str, str]]:
    """Return the data set and, of one of the user's own, its SHA-256 as ``data``."""
    dataset = load(
        config.dataset_name,
        config.data_path,
        seed=config.seed,
        device=device,
        mirror=config.mirror,
        image_size=config.image_size or None,
    )
    return dataset, {"data": _sha256(dataset)} if ":" in config.dataset_name else {}


def _sha256(dataset: Dataset) -> str:
    """Return the SHA-256 of all examples, and of what makes inputs of them."""
    tensors = {
        f"{which}.{name}": tensor
        for which, split in dataset.splits.items()
        for name, tensor in vars(split).items()
    }
    apart = ("name", *dataset.splits)
    values = {name: value for name, value in vars(dataset).items() if name not in apart}
    return hashlib.sha256(f"{values} {weights_sha256(tensors)}".encode()).hexdigest()


def dataset_key(config: RunConfig) -> tuple[str, str, int, int]:
    """What determines the examples of a run's data set, for a cache."""
    return config.dataset_name, str(config.data_path.absolute()), config.seed, config.image_size


def _read_kept(cache: Cache, path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    if not path.is_file():
        return read_network(path)  # which says what is wrong
    stat = path.stat()
    key = (str(path.absolute()), stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return cache.get("network", key, lambda: read_network(path))


def _check_training(
    config: RunConfig, dataset: Dataset, network: nn.Module, start: Mask | None
) -> None:
    if config.train != "sparse" or not (config.prunes or start):
        return
    try:
        check_sparse(network, dataset)
    except ValueError as error:
        raise ValueError(f"--train sparse cannot train {config.arch}: {error}") from None
    if next(network.parameters()).device.type == "cpu" and not compiler_available():
        raise ValueError("--train sparse needs a C compiler, and there is none here")


def _check_forward(config: RunConfig, device: torch.device) -> None:
    world = current().world
    if world > 1 and not config.plain:
        given = "--compile" if config.amp == "off" else f"--amp {config.amp}"
        raise ValueError(f"{given} is for one process, and there are {world}")
    if config.compiled:
        check_compiler(device)
