"""Which layers run in a network, on what, and what that costs."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lossprune.channels.calls import Call
from lossprune.channels.tracing import apart
from lossprune.pruning.prunable import LAYERS
from lossprune.pruning.wholeness import check_whole, unwrapped

M = TypeVar("M", bound=nn.Module)

# Calls a network with what is of interest.
Caller = Callable[[nn.Module], object]


def multiply_adds(model: nn.Module, example: Any) -> int:
    """Count the multiply-adds of the linear and convolution layers for one batch ``example``.

    Each output number of such a layer takes as many as one of its units has weights, zeros
    included.  ``example`` is a batch of inputs, a tuple of arguments, or a dict of keyword
    arguments.  On the meta device, a network without values and such an example will do.

    Raises:
        PruningError: the network's parameters are not initialised yet, sharded or without values.

    >>> multiply_adds(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(2, 3, 5, 5))
    1944
    """
    return sum(multiply_adds_by_layer(model, example).values())


@torch.no_grad()
def multiply_adds_by_layer(model: nn.Module, example: Any) -> dict[str, int]:
    """Return what :func:`multiply_adds` counts of each layer that runs, by the layer's name."""
    if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(example)):
        check_whole(model, offloaded=True)
    network = apart(unwrapped(model)).eval()
    layers = {name: part for name, part in network.named_modules() if isinstance(part, LAYERS)}
    own = Call.of(example).copied()
    outputs = count_outputs(network, layers, lambda whole: whole(*own.inputs, **own.named))
    return {
        name: count * math.prod(layers[name].weight.shape[1:]) for name, count in outputs.items()
    }


def count_outputs(
    network: nn.Module, layers: Mapping[str, nn.Module], call: Caller
) -> Counter[str]:
    """Count the numbers that each of ``layers`` gives where ``call`` calls ``network``, by name."""
    outputs: Counter[str] = Counter()

    def count(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        outputs[name] += output.numel()

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(count, name)))
        call(network)
    return outputs


@torch.no_grad()
def inputs_of(network: nn.Module, call: Caller, modules: Sequence[M]) -> dict[M, Call]:
    """Return how each of ``modules`` is called first where ``call`` calls ``network``."""
    seen: dict[M, Call] = {}

    def note(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.setdefault(module, Call(args, named))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        call(network)
    return seen


def weighted_layers(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the linear layers and two-dimensional convolutions of a network, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
