"""The multilayer perceptron: linear layers with tanh between them."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

from lossprune.networks.building import checked_shape


def mlp(
    *,
    shape: Sequence[int] = (1, 28, 28),
    classes: int = 10,
    hidden: Sequence[int] = (300, 100),
) -> nn.Sequential:
    """Return flatten → (linear → tanh) for each of ``hidden`` → linear, all with biases.

    Inputs of any shape with channels · height · width numbers an example are flattened; the
    layers are ``fc1``, ``fc2``, … At its defaults this is 784-300-100-10: 266,610 parameters.

    Raises:
        ValueError: a size is not a whole number of at least 1.
    """
    inputs = prod(checked_shape("MLP", shape, classes))
    if not all(isinstance(width, int) and width >= 1 for width in hidden):
        raise ValueError(f"MLP: hidden must be widths of at least 1, got {tuple(hidden)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (fan_in, fan_out) in enumerate(pairwise((inputs, *hidden, classes)), start=1):
        if number > 1:
            layers[f"tanh{number - 1}"] = nn.Tanh()
        layers[f"fc{number}"] = nn.Linear(fan_in, fan_out)
    return nn.Sequential(layers)
