"""Networks and criteria that flags name: those of the tables, and functions of the user's own."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.data import Dataset
from lossprune.experiment.config import RunConfig
from lossprune.networks import NETWORKS
from lossprune.pruning.criteria import CRITERIA, Criterion
from lossprune.torch_state import in_mode, seeded
from lossprune.user_code import call, file_sha256, find_criterion, find_function, offering

_TRIED = 2  # examples; with one alone a network may mistake a dimension for another


def build_network(config: RunConfig, dataset: Dataset) -> nn.Module:
    """Return the run's network as it is before training, on the CPU.

    A function of the user's own is called with those of ``shape``, ``classes`` and ``generator``
    that it names, under the run's seed; torch's global generators are left as they were.  Its
    network is tried on two examples, which also gives lazy modules their shapes.

    Raises:
        ValueError: there is no such function, it fails, or its network gives no logits.
    """
    offered = {
        "shape": dataset.shape,
        "classes": len(dataset.classes),
        "generator": torch.Generator().manual_seed(config.seed),
    }
    if ":" not in config.arch:
        return NETWORKS[config.arch](**offered)
    with seeded(config.seed):
        function = find_function(config.arch, "--arch")
    with seeded(config.seed):  # anew: a module draws only when it is imported for the first time
        build = offering(function, offered, f"--arch {config.arch}")
        # A copy: the module may have built it once for all, and another run may train it, too.
        network = call(lambda: deepcopy(build()), config.arch, "--arch")
        if not isinstance(network, nn.Module):
            raise ValueError(
                f"--arch {config.arch} must return a torch.nn.Module, it returned an object of "
                f"type {type(network).__name__}"
            )
        _try(network.cpu(), config.arch, dataset)
    return network


@torch.no_grad()
def _try(network: nn.Module, arch: str, dataset: Dataset) -> None:
    """Raise ValueError unless the network gives logits for examples of the data set."""
    inputs = dataset.inputs(dataset.train.images[:_TRIED]).cpu()
    with in_mode(network, training=False):
        logits: Any = call(lambda: network(inputs), arch, "--arch")
    told = f"--arch {arch} must give logits of shape (examples, {len(dataset.classes)})"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise ValueError(f"{told}, it gives an object of type {type(logits).__name__}")
    fits = logits.ndim == 2 and len(logits) == len(inputs)
    if not fits or logits.shape[1] < len(dataset.classes):
        raise ValueError(
            f"{told}, it gives {tuple(logits.shape)} for {len(inputs)} inputs of shape "
            f"{dataset.shape}"
        )


def criterion_of(config: RunConfig) -> Criterion:
    """Return the run's criterion; one of the user's own is called as the flag names it.

    Raises:
        ValueError: there is no such criterion.
    """
    if ":" in config.criterion:
        return find_criterion(config.criterion, "--pm")
    return CRITERIA[config.criterion]


def code_of(config: RunConfig) -> dict[str, str]:
    """Return the SHA-256 of the files of the user's own modules, once imported, by flag."""
    named = {"arch": config.arch, "dataset": config.dataset_name, "pm": config.criterion}
    digests = {flag: file_sha256(name) for flag, name in named.items() if ":" in name}
    return {flag: digest for flag, digest in digests.items() if digest is not None}
