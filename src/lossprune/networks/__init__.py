"""The networks of the published experiments, and ImageNet's, at any size that their shape allows.

``NETWORKS`` maps a name to a function that builds a freshly initialised network. Every entry takes
the keyword arguments

* ``shape``: (channels, height, width) of one input,
* ``classes``: the number of outputs (logits),
* ``generator``: the ``torch.Generator`` that draws the weights; None draws from torch's global
  one, as any torch module does.

>>> network = NETWORKS["MLP"](shape=(1, 8, 8), classes=10, hidden=(32,))
>>> [name for name, _ in network.named_parameters()]
['fc1.weight', 'fc1.bias', 'fc2.weight', 'fc2.bias']

To add a network, write a function that returns an ``nn.Module`` and give it a line here. torch is
imported only when an entry is called, so that the table can be read for flags and help at no cost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["NETWORKS"]


def _build(family: str, *, generator: torch.Generator | None = None, **options: Any) -> nn.Module:
    """Return a network of ``family``: the function of that name in the module of that name."""
    from lossprune.networks.building import initialised

    function = getattr(import_module(f"lossprune.networks.{family}"), family)
    return initialised(partial(function, **options), generator)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "MLP": partial(_build, "mlp"),
    "VGG11": partial(_build, "vgg", depth=11),
    "VGG19": partial(_build, "vgg", depth=19),
    "VGG11BN": partial(_build, "vgg", depth=11, batch_norm=True),
    "VGG19BN": partial(_build, "vgg", depth=19, batch_norm=True),
    "PreActResNet18": partial(_build, "preact_resnet", depth=18),
    "PreActResNet34": partial(_build, "preact_resnet", depth=34),
    "PreActResNet50": partial(_build, "preact_resnet", depth=50),
    "PreActResNet101": partial(_build, "preact_resnet", depth=101),
    "PreActResNet152": partial(_build, "preact_resnet", depth=152),
    "ResNet18": partial(_build, "resnet", depth=18),
    "ResNet34": partial(_build, "resnet", depth=34),
    "ResNet50": partial(_build, "resnet", depth=50),
    "ResNet101": partial(_build, "resnet", depth=101),
    "ResNet152": partial(_build, "resnet", depth=152),
}
