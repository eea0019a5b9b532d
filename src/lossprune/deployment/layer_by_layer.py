"""Layers replaced one by one, where that is faster.

So are made networks whose graph is not known, all on a machine without a C compiler, and those on a
GPU.
"""

import copy
import time
from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lossprune.channels.costs import Caller, inputs_of, weighted_layers
from lossprune.deployment.race import Budget, race
from lossprune.deployment.sparse_layers import MakeLayer, semi_structured_layer


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
    network: nn.Module,
    call: Caller,
    budget: Budget,
    make: MakeLayer,
    chosen: Collection[str] | None = None,
) -> tuple[nn.Module, dict[str, float]] | None:
    """Return a copy with a sparse layer wherever it is faster than torch's, and their seconds.

    None where there is no such layer.

    Args:
        network: left unchanged.
        call: calls it with what layers are timed on.
        budget: what the comparisons may take.
        make: makes the sparse layers.
        chosen: the layers to replace, where that is known.
    """
    network = copy.deepcopy(network)

    def fitting(
        name: str, layer: nn.Module, args: tuple[Tensor, ...], budget: Budget
    ) -> nn.Module | None:
        wanted = chosen is None or name in chosen
        fits = wanted and type(layer) in _CLASSES and _suits(args[0])
        return make(name, layer, args, budget) if fits else None

    found = _faster(network, call, budget, fitting, compared=chosen is None)
    if not found:
        return None
    replaced: dict[nn.Module, nn.Module] = {
        faster.layer: _CLASSES[type(faster.layer)](faster.layer, faster.sparse, faster.args[0])
        for faster in found.values()
    }
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):
            if child in replaced:
                setattr(module, name, replaced[child])
    times = {name: faster.seconds for name, faster in found.items()}
    return replaced.get(network, network), times


def replaced_layers(network: nn.Module) -> set[str]:
    """Return the names of the layers that were replaced."""
    return {name for name, module in network.named_modules() if isinstance(module, _Replaced)}


@torch.no_grad()
def with_semi_structured(
    masked: nn.Module, call: Caller, budget: Budget
) -> tuple[nn.Module, set[str]]:
    """Return a copy whose 2:4 linear layers are semi-structured where faster, and their names."""
    network = copy.deepcopy(masked)
    found = _faster(network, call, budget, semi_structured_layer, compared=True)
    for faster in found.values():
        faster.layer.weight = faster.sparse.get_parameter("weight")
    return network, set(found)


class _Faster(NamedTuple):
    """A layer, the sparse one that is faster, its seconds, and what they are called with."""

    layer: Any
    sparse: nn.Module
    seconds: float
    args: tuple[Tensor, ...]


def _faster(
    network: nn.Module, call: Caller, budget: Budget, make: MakeLayer, *, compared: bool
) -> dict[str, _Faster]:
    """Return each layer that has a faster sparse one, by its name; any that has one if not so."""
    names: dict[nn.Module, str] = {layer: name for name, layer in weighted_layers(network).items()}
    seen = inputs_of(network, call, list(names))
    found = {}
    for done, (layer, own) in enumerate(seen.items()):
        args, share = (*own.inputs, *own.named.values()), budget.part(1 / (len(seen) - done))
        sparse = make(names[layer], layer, args, share.part(0.5))
        if sparse is None:
            continue
        times = [0.0, float("inf")]
        if compared:
            calls = [partial(_finish, module, args) for module in (sparse, layer)]
            on_gpu = any(tensor.is_cuda for tensor in args)
            times = race(calls, share, now=time.perf_counter if on_gpu else None)
        if times[0] < times[1]:
            found[names[layer]] = _Faster(layer, sparse, times[0], args)
    return found


def _finish(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    if layer(*args).is_cuda:
        torch.cuda.synchronize()
