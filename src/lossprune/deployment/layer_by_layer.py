"""Networks whose graph is not known: layers are replaced one by one, where that is faster."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from lossprune.deployment.sparse.parts import in_parts, inputs_of, sparse_networks
from lossprune.deployment.sparse.tuning import tune_, weighted_layers
from lossprune.deployment.timing import interleaved

Make = Callable[[str, nn.Module, tuple[Tensor, ...], float], nn.Module | None]


class _Replaced:
    """A layer as it was, for code that reads its attributes or asks for its class.

    ``sparse`` computes what is like the example; all else is computed as before.
    """

    def __init__(self, layer: nn.Module, sparse: nn.Module, example: Tensor) -> None:
        self.__dict__.update(layer.__dict__)
        self._modules: dict[str, nn.Module | None] = {"sparse": sparse}
        self.dimensions = example.dim()

    def forward(self, input: Tensor) -> Any:  # noqa: A002, as torch names it
        if input.dim() == self.dimensions and _suits(input):
            return self._modules["sparse"](input)  # type: ignore[misc]
        return super().forward(input)  # type: ignore[misc]


class SparseLinear(_Replaced, nn.Linear):
    """A linear layer that a sparse one computes."""


class SparseConv2d(_Replaced, nn.Conv2d):
    """A convolution that a sparse one computes."""


_CLASSES = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}


def _suits(tensor: Tensor) -> bool:
    """Whether the sparse layers take it: they compute no gradients."""
    asks = tensor.requires_grad and torch.is_grad_enabled()
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not asks


@torch.no_grad()
def layer_by_layer(
    network: nn.Module, call: Callable[[nn.Module], object], seconds: float, make: Make
) -> nn.Module | None:
    """Return a copy of ``network`` with a sparse layer wherever it is faster than torch's.

    None where there is no such layer.

    Args:
        network: left unchanged.
        call: calls it with what layers are timed on.
        seconds: how long the comparison of one layer may take.
        make: returns the sparse layer for a layer's name, itself, its inputs and how long it may
            take to tune it, or None.
    """
    network = copy.deepcopy(network)
    layers = weighted_layers(network)
    names = {layer: name for name, layer in layers.items()}
    replaced: dict[nn.Module, nn.Module] = {}
    for layer, its in inputs_of(network, call, list(layers.values())).items():
        args = (*its.inputs, *its.named.values())
        if type(layer) not in _CLASSES or not _suits(args[0]):
            continue
        sparse = make(names[layer], layer, args, min(seconds, 0.1))
        if sparse is None:
            continue
        calls: list[Callable[[], object]] = [
            (lambda module=module, args=args: module(*args)) for module in (sparse, layer)
        ]
        fast, slow = interleaved(calls, seconds=seconds)
        if fast.best < slow.best:
            replaced[layer] = _CLASSES[type(layer)](layer, sparse, args[0])
    if not replaced:
        return None
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):
            if child in replaced:
                setattr(module, name, replaced[child])
    return replaced.get(network, network)


def replaced_layers(network: nn.Module) -> set[str]:
    """Return the names of the layers that were replaced."""
    return {name for name, module in network.named_modules() if isinstance(module, _Replaced)}


def sparse_layer(
    name: str, layer: nn.Module, args: tuple[Tensor, ...], seconds: float
) -> nn.Module | None:
    """Return one layer as a sparse network of its own, tuned; None where the kernels have none."""
    alone = nn.Sequential(layer).eval()
    graph = fx.GraphModule(alone, fx.symbolic_trace(alone).graph)
    ShapeProp(graph).propagate(*args)
    sparse = in_parts(graph)
    if not sparse_networks(sparse):
        return None
    for part in sparse_networks(sparse):
        part.steps = tuple(replace(step, name=name) for step in part.steps)
    tune_(sparse, lambda network: network(*args), seconds)
    return sparse
