"""What running a network costs."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lossprune.channels.calls import Call
from lossprune.channels.tracing import apart
from lossprune.pruning.prunable import LAYERS
from lossprune.pruning.wholeness import check_whole, unwrapped


@torch.no_grad()
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
    if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(example)):
        check_whole(model, offloaded=True)
    network = apart(unwrapped(model)).eval()
    layers = {name: part for name, part in network.named_modules() if isinstance(part, LAYERS)}
    own = Call.of(example).copied()
    outputs = count_outputs(network, layers, lambda whole: whole(*own.inputs, **own.named))
    return sum(count * math.prod(layers[name].weight.shape[1:]) for name, count in outputs.items())


def count_outputs(
    network: nn.Module, layers: Mapping[str, nn.Module], call: Callable[[nn.Module], object]
) -> Counter[str]:
    """Count the numbers that each of ``layers`` gives where ``call`` calls ``network``, by name."""
    outputs: Counter[str] = Counter()

    def count(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        outputs[name] += output.numel()

    hooks = [
        layer.register_forward_hook(functools.partial(count, name))
        for name, layer in layers.items()
    ]
    try:
        call(network)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
