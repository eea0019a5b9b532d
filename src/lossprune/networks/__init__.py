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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["NETWORKS"]


def _mlp(*, generator: torch.Generator | None = None, **options: Any) -> nn.Module:
    from lossprune.networks.initialisation import initialised
    from lossprune.networks.mlp import mlp

    return initialised(partial(mlp, **options), generator)


def _vgg(*, generator: torch.Generator | None = None, **options: Any) -> nn.Module:
    from lossprune.networks.initialisation import initialised
    from lossprune.networks.vgg import vgg

    return initialised(partial(vgg, **options), generator)


def _preact_resnet(*, generator: torch.Generator | None = None, **options: Any) -> nn.Module:
    from lossprune.networks.initialisation import initialised
    from lossprune.networks.preact_resnet import preact_resnet

    return initialised(partial(preact_resnet, **options), generator)


def _resnet(*, generator: torch.Generator | None = None, **options: Any) -> nn.Module:
    from lossprune.networks.initialisation import initialised
    from lossprune.networks.resnet import resnet

    return initialised(partial(resnet, **options), generator)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "MLP": _mlp,
    "VGG11": partial(_vgg, depth=11),
    "VGG19": partial(_vgg, depth=19),
    "VGG11BN": partial(_vgg, depth=11, batch_norm=True),
    "VGG19BN": partial(_vgg, depth=19, batch_norm=True),
    "PreActResNet18": partial(_preact_resnet, depth=18),
    "PreActResNet34": partial(_preact_resnet, depth=34),
    "PreActResNet50": partial(_preact_resnet, depth=50),
    "PreActResNet101": partial(_preact_resnet, depth=101),
    "PreActResNet152": partial(_preact_resnet, depth=152),
    "ResNet18": partial(_resnet, depth=18),
    "ResNet34": partial(_resnet, depth=34),
    "ResNet50": partial(_resnet, depth=50),
    "ResNet101": partial(_resnet, depth=101),
    "ResNet152": partial(_resnet, depth=152),
}
