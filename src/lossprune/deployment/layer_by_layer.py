"""Networks whose graph is not known: layers are replaced one by one, where that is faster."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from lossprune.deployment.sparse_parts import in_parts, inputs_of, sparse_networks
from lossprune.deployment.sparse_tuning import tune_, weighted_layers
from lossprune.deployment.timing import interleaved

Make = Callable[[nn.Module, tuple[Tensor, ...]], nn.Module | None]


@torch.no_grad()
def layer_by_layer(
    network: nn.Module, inputs: tuple[Tensor, ...], seconds: float, make: Make
) -> nn.Module:
    """Return a copy of ``network`` with a sparse layer wherever it is faster than torch's.

    Args:
        network: left unchanged.
        inputs: on which layers are timed.
        seconds: how long the comparison of one layer may take.
        make: returns the sparse layer for a layer and its inputs, or None.
    """
    network = copy.deepcopy(network)
    layers = weighted_layers(network)
    for layer, args in inputs_of(network, inputs, list(layers.values())).items():
        sparse = make(layer, args)
        if sparse is None:
            continue
        calls: list[Callable[[], object]] = [
            (lambda module=module, args=args: module(*args)) for module in (sparse, layer)
        ]
        fast, slow = interleaved(calls, seconds=seconds)
        if fast.best < slow.best:
            _replace_(network, layer, sparse)
    return network


def sparse_layer(layer: nn.Module, args: tuple[Tensor, ...]) -> nn.Module | None:
    """Return one layer as a sparse network of its own, tuned; None where the kernels have none."""
    alone = nn.Sequential(layer).eval()
    graph = fx.GraphModule(alone, fx.symbolic_trace(alone).graph)
    ShapeProp(graph).propagate(*args)
    sparse = in_parts(graph)
    if not sparse_networks(sparse):
        return None
    tune_(sparse, args, 0.1)
    return sparse


def _replace_(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if child is old:
                setattr(module, name, new)
