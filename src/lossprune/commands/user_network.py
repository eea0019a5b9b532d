"""The network that a user's function builds, with the weights of a file; a loss of their own."""

from collections.abc import Callable, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

from torch import nn

from lossprune.deployment.sparse_file import is_sparse_file, load_sparse
from lossprune.experiment.environment import choose_device
from lossprune.experiment.network_file import load_weights_, read_network, weights_sha256
from lossprune.pruning import LOSSES
from lossprune.user_code import call, find_function, find_object, offering


def build_network(
    build: str, weights: Path | None = None, offered: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return the network that the user's function makes, with the weights of a file if given.

    It is called with those of the arguments ``offered`` that it names.

    Raises:
        ValueError: there is no such function, it fails, or it makes something else; or the file
            does not hold this network.
    """
    here = Path.cwd()  # the function may change it
    function = find_function(build, "MODULE:BUILD")
    if offered:
        function = offering(function, offered, f"MODULE:BUILD {build}")
    network = call(function, build, "MODULE:BUILD")
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"MODULE:BUILD {build} must return a torch.nn.Module, "
            f"it returned an object of type {type(network).__name__}"
        )
    if weights is None:
        return network
    with chdir(here):
        if weights.is_file() and is_sparse_file(weights):
            load_sparse(weights, network)
        else:
            given, _, _ = read_network(weights, "--weights: ")
            load_weights_(network, type(network).__name__, weights, given, {}, "--weights: ")
    return network


def on_device(network: nn.Module, device: str) -> nn.Module:
    """Return the network on the device that ``--device`` names; ``auto`` leaves it on a GPU.

    Raises:
        ValueError: there is no such device.
    """
    kinds = {parameter.device.type for parameter in network.parameters()}
    chosen = choose_device(device, None)
    if kinds <= {chosen.type} or (device == "auto" and kinds != {"cpu"}):
        return network
    return network.to(chosen)


def origin_of(network: nn.Module) -> dict[str, str]:
    """Return what the record tells of the network that is to be pruned."""
    return {
        "class": type(network).__name__,
        "weights_sha256": weights_sha256(network.state_dict()),
    }


def users_forward(named: str | None) -> Callable[..., Any] | None:
    """Return the function that ``--forward`` names, if it is given."""
    return None if named is None else find_function(named, "--forward")


def users_loss(named: str) -> Any:
    """Return the loss that ``--loss`` names, in the library or as MODULE:LOSS.

    Raises:
        ValueError: there is none.
    """
    if ":" in named:
        return find_object(named, "--loss")
    if named not in LOSSES:
        raise ValueError(f"--loss must be one of {', '.join(LOSSES)} or MODULE:LOSS, got {named!r}")
    return named
