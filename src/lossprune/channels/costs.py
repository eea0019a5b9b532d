"""What running a network costs."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lossprune.channels.calls import Call
from lossprune.channels.tracing import apart
from lossprune.pruning.prunable import LAYERS
from lossprune.pruning.wholeness import check_whole
from lossprune.pruning.wrappers import unwrapped


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
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer.weight, Tensor)
        total += output.numel() * math.prod(layer.weight.shape[1:])

    network = apart(unwrapped(model)).eval()
    for layer in network.modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(count)
    own = Call.of(example).copied()
    network(*own.inputs, **own.named)
    return total
