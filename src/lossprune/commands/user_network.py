"""The network that a user's function builds, with the weights of a file."""

from contextlib import chdir
from pathlib import Path

from torch import nn

from lossprune.deployment.sparse_file import is_sparse_file, load_sparse
from lossprune.experiment.network_file import load_weights_, read_network
from lossprune.user_code import call, find_function


def build_network(build: str, weights: Path | None = None) -> nn.Module:
    """Return the network that the user's function makes, with the weights of a file if given.

    Raises:
        ValueError: there is no such function, it fails, or it makes something else; or the file
            does not hold this network.
    """
    here = Path.cwd()  # the function may change it
    function = find_function(build, "MODULE:BUILD")
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
