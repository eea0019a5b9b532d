"""Layers replaced one by one, where that is faster.

So are made networks whose graph is not known, all on a machine without a C compiler, and those on a
GPU.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.channels.costs import Caller, inputs_of, weighted_layers
from lossprune.deployment.candidates import interleaved
from lossprune.deployment.sparse_layers import MakeLayer, semi_structured_layer

_TUNING = 0.1  # seconds at most for one layer


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
    network: nn.Module, call: Caller, seconds: float, make: MakeLayer
) -> nn.Module | None:
    """Return a copy of ``network`` with a sparse layer wherever it is faster than torch's.

    None where there is no such layer.

    Args:
        network: left unchanged.
        call: calls it with what layers are timed on.
        seconds: how long the comparison of one layer may take.
        make: makes the sparse layers.
    """
    network = copy.deepcopy(network)

    def fitting(
        name: str, layer: nn.Module, args: tuple[Tensor, ...], seconds: float
    ) -> nn.Module | None:
        fits = type(layer) in _CLASSES and _suits(args[0])
        return make(name, layer, args, seconds) if fits else None

    replaced: dict[nn.Module, nn.Module] = {
        layer: _CLASSES[type(layer)](layer, sparse, args[0])
        for layer, (sparse, args) in _faster(network, call, seconds, fitting).items()
    }
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


@torch.no_grad()
def with_semi_structured(
    masked: nn.Module, call: Caller, seconds: float
) -> tuple[nn.Module, set[str]]:
    """Return a copy whose 2:4 linear layers are semi-structured where faster, and their names."""
    network = copy.deepcopy(masked)
    faster = _faster(network, call, seconds, semi_structured_layer)
    changed = {name for name, layer in weighted_layers(network).items() if layer in faster}
    for layer, (sparse, _) in faster.items():
        layer.weight = sparse.get_parameter("weight")
    return network, changed


def _faster(
    network: nn.Module, call: Caller, seconds: float, make: MakeLayer
) -> dict[nn.Module, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Return, for each layer that has a faster sparse one, that one and the layer's inputs."""
    names: dict[nn.Module, str] = {layer: name for name, layer in weighted_layers(network).items()}
    faster = {}
    for layer, seen in inputs_of(network, call, list(names)).items():
        args = (*seen.inputs, *seen.named.values())
        sparse = make(names[layer], layer, args, min(seconds, _TUNING))
        if sparse is None:
            continue
        calls = [partial(_finish, module, args) for module in (sparse, layer)]
        fast, slow = interleaved(calls, seconds=seconds)
        if fast.best < slow.best:
            faster[layer] = sparse, args
    return faster


def _finish(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    if layer(*args).is_cuda:
        torch.cuda.synchronize()
