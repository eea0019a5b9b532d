"""All that a run needs before it may write a byte: device, data, network, and their checks."""

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lossprune
from lossprune.data import Dataset, load
from lossprune.experiment.cache import Cache
from lossprune.experiment.config import RunConfig
from lossprune.experiment.network_file import load_weights_, read_network, weights_sha256
from lossprune.experiment.ranks import current, own_device
from lossprune.experiment.record import RunRecord, Start
from lossprune.flags import MOST_THREADS
from lossprune.kernels.compiler import compiler_available
from lossprune.networks import NETWORKS
from lossprune.pruning import prune_by_stage
from lossprune.training.perceptron.structure import check_sparse
from lossprune.training.precision import check_compiler

_EXAMPLES_PER_BATCH = 100


@dataclass(frozen=True)
class Setting:
    """A run ready to begin."""

    config: RunConfig
    device: torch.device
    dataset: Dataset
    network: nn.Module
    start: Start
    environment: Mapping[str, Any]


class StageExamples:
    """The training examples of each pruning stage, drawn from the seed and the stage alone.

    So a run that resumes at a stage measures on the very examples it would have seen.  Without
    augmentation; ``stage`` is set by whoever prunes.
    """

    def __init__(self, dataset: Dataset, examples: int, seed: int) -> None:
        self.dataset = dataset
        self.examples = examples
        self.seed = seed
        self.stage = 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Seeds that are close together would meet those of the epochs, seed + epoch.
        mixed = (self.seed * 1_000_003 + self.stage * 998_244_353 + 0x5EED) % 2**63
        generator = torch.Generator().manual_seed(mixed)
        train = self.dataset.train
        order = torch.randperm(len(train), generator=generator)[: self.examples]
        return self.dataset.batches(train, _EXAMPLES_PER_BATCH, order=order)


def prepare(
    config: RunConfig, unfinished: RunRecord | None = None, cache: Cache | None = None
) -> Setting:
    """Load data and network and check what flags alone cannot tell.

    Args:
        config: the run.
        unfinished: the record of the same run, if it was interrupted: it goes on where it ran.
        cache: keeps the data set and the start network for the next run.

    Raises:
        ValueError: no CUDA; wrong data; a network that does not fit them or ``--model_0``; fewer
            training examples than ``--nex``; a sparsity that leaves nothing;
            ``--train sparse``, ``--amp`` or ``--compile`` where that cannot be done.
        FileNotFoundError: ``--model_0`` or the data set is not there.
    """
    device = _choose_device(config.device, unfinished)
    generator = torch.Generator().manual_seed(config.seed)
    cache = cache or Cache()
    start = None if config.start is None else _read_start(config.start, cache)
    dataset = cache.get(
        "dataset",
        (*dataset_key(config), str(device)),
        lambda: load(
            config.dataset_name,
            config.data_path,
            seed=config.seed,
            device=device,
            mirror=config.mirror,
            image_size=config.image_size or None,
        ),
    )
    network = NETWORKS[config.arch](
        shape=dataset.shape, classes=len(dataset.classes), generator=generator
    )
    path = sha256 = None
    if config.start is not None and start is not None:
        weights, metadata, sha256 = start
        path = str(config.start)
        load_weights_(network, config.arch, config.start, weights, metadata)
    _check_pruning(config, dataset, network)
    network = network.to(device)
    _check_training(config, dataset, network)
    _check_forward(config, device)
    return Setting(
        config=config,
        device=device,
        dataset=dataset,
        network=network,
        start=Start(path, sha256, weights_sha256(network.state_dict())),
        environment=environment_of(device),
    )


def dataset_key(config: RunConfig) -> tuple[str, str, int, int]:
    """What determines the examples of a run's data set, for a cache."""
    return config.dataset_name, str(config.data_path.absolute()), config.seed, config.image_size


def _read_start(path: Path, cache: Cache) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    if not path.is_file():
        return read_network(path)  # which says what is wrong
    stat = path.stat()
    key = (str(path.absolute()), stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return cache.get("network", key, lambda: read_network(path))


def _choose_device(name: str, unfinished: RunRecord | None) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    if name == "auto":
        ran_on = None if unfinished is None else unfinished.environment.get("device")
        name = "cuda" if available and ran_on != "cpu" else "cpu"
    return own_device(name)


def _check_pruning(config: RunConfig, dataset: Dataset, network: nn.Module) -> None:
    if not config.prunes:
        return
    if config.examples > len(dataset.train):
        raise ValueError(
            f"--nex must be at most {len(dataset.train)}, the training examples of {dataset.name}, "
            f"got {config.examples}"
        )
    # Checks its arguments against the network when called; the work begins with the first stage.
    prune_by_stage(
        network,
        config.criterion,
        sparsity=config.sparsity,
        data=StageExamples(dataset, config.examples, config.seed),
        examples=config.examples,
        stages=config.stages,
        schedule=config.schedule,
        reg=config.reg,
        estimator=config.estimator,
    )


def _check_training(config: RunConfig, dataset: Dataset, network: nn.Module) -> None:
    if config.train != "sparse" or not config.prunes:
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


def environment_of(device: torch.device) -> dict[str, Any]:
    """Return the versions and the machine that a computation on ``device`` ran with."""
    import numpy as np

    cuda = device.type == "cuda"
    return {
        "lossprune": lossprune.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": current().world,
    }


@contextmanager
def computing(config: RunConfig, unfinished: RunRecord | None) -> Iterator[None]:
    """Set threads and deterministic algorithms for a run, and put back what was there.

    An interrupted run goes on with as many threads as it had, unless ``--threads`` says otherwise:
    another number may round differently.
    """
    threads = torch.get_num_threads()
    recorded = None if unfinished is None else unfinished.environment.get("threads")
    if not (isinstance(recorded, int) and 1 <= recorded <= MOST_THREADS):
        recorded = None  # a record can say anything
    try:
        torch.set_num_threads(config.threads or recorded or threads)
        with _deterministic():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Choose deterministic algorithms on a GPU; on a CPU there are no others for what runs here.

    Not on a CPU also because the switch alone makes torch import its compiler, for two seconds.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
