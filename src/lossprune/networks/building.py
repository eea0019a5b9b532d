"""What every network is built with: a shape that is checked, and initial values.

Kaiming-normal weights, zero biases, batch norms that start as the identity: Kaiming He et al.,
"Delving Deep into Rectifiers" (2015): a weight is drawn from N(0, 2 / fan-in), the gain √2 being
that of the ReLU. The published experiments use it for the tanh network as well.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn


def initialised(build: Callable[[], nn.Module], generator: torch.Generator | None) -> nn.Module:
    """Return ``build()`` with its weights drawn from ``generator``, on the generator's device.

    The modules are made on the meta device, so that torch's own initial values are never drawn:
    with a generator given the global random state is left as found, and without one it moves by
    exactly the numbers used.
    """
    device = torch.get_default_device() if generator is None else generator.device
    with torch.device("meta"):
        network = build()
    network.to_empty(device=device)
    initialise_(network, generator)
    return network


@torch.no_grad()
def initialise_(network: nn.Module, generator: torch.Generator | None) -> None:
    """Draw all parameters of ``network`` anew, in the order of its modules.

    Raises:
        TypeError: a module holds parameters or buffers of a kind that has no rule here.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif module._parameters or module._buffers:
            raise TypeError(f"no initial values are defined for {name} ({type(module).__name__})")


def checked_shape(network: str, shape: Sequence[int], classes: int) -> tuple[int, int, int]:
    """Return ``shape`` as (channels, height, width).

    Raises:
        ValueError: ``shape`` is not three whole numbers of at least 1, or ``classes`` is not a
            whole number of at least 1.

    >>> checked_shape("MLP", [1, 28, 28], classes=10)
    (1, 28, 28)
    >>> checked_shape("MLP", (28, 28), classes=10)
    Traceback (most recent call last):
    ValueError: MLP: shape must be (channels, height, width), each at least 1, got (28, 28)
    """
    if len(shape) != 3 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(
            f"{network}: shape must be (channels, height, width), each at least 1, "
            f"got {tuple(shape)}"
        )
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"{network}: classes must be a whole number of at least 1, got {classes}")
    channels, height, width = shape
    return channels, height, width
