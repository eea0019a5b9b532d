"""Networks to stack, with masks and optimizers of their own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lossprune.networks import NETWORKS
from lossprune.pruning import Mask
from lossprune.training import make_optimizer


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perceptron(seed: int) -> nn.Module:
    return NETWORKS["MLP"](shape=(1, 8, 8), hidden=(30, 20), generator=seeded(seed))


def rectifiers(seed: int) -> nn.Module:
    """ReLU, a layer without bias, and two linear layers in a row."""
    return drawn(
        nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 30, bias=False),
            nn.ReLU(),
            nn.Linear(30, 20),
            nn.Linear(20, 10),
        ),
        seed,
    )


def convolutions(seed: int) -> nn.Module:
    return drawn(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(96, 10),
        ),
        seed,
    )


def normalised(seed: int) -> nn.Module:
    """Batch norm on images, on the inputs themselves, and on rows."""
    return drawn(
        nn.Sequential(
            nn.BatchNorm2d(1),
            nn.Conv2d(1, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(216, 10, bias=False),
            nn.BatchNorm1d(10),
        ),
        seed,
    )


def normalised_inside(seed: int) -> nn.Module:
    """Not on the images themselves, which torch cannot batch on CUDA."""
    return drawn(normalised(seed)[1:], seed)


def drawn(network: nn.Module, seed: int) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=seeded(seed))
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:  # biases, and the scales of batch norm
                parameter.copy_(1 + 0.1 * noise)
            seed += 1
    return network


def random_mask(network: nn.Module, left: float, seed: int) -> Mask:
    generator = seeded(seed)
    return Mask(
        {
            name: torch.rand(weight.shape, generator=generator) < left
            for name, weight in network.named_parameters()
            if weight.ndim > 1
        }
    )


@dataclass
class Runs:
    """Networks with masks, learning rates, decays and orders of their own, some order shared."""

    networks: list[nn.Module]
    masks: Sequence[Mask | None]
    optimizers: list[torch.optim.SGD]
    order_of: Sequence[int] = (0, 0, 1, 1)

    def generators(self, epoch: int) -> list[torch.Generator]:
        return [seeded(100 * which + epoch) for which in self.order_of]


def make_runs(build: Callable[[int], nn.Module], *, momentum: float = 0.9) -> Runs:
    networks = [build(10 * number) for number in range(4)]
    masks = [None, *(random_mask(it, 0.4, seed) for seed, it in enumerate(networks[1:]))]
    for network, mask in zip(networks, masks, strict=True):
        if mask is not None:
            mask.apply_(network)
    return Runs(networks, masks, optimizers_of(networks, momentum))


def optimizers_of(networks: list[nn.Module], momentum: float = 0.9) -> list[torch.optim.SGD]:
    return [
        make_optimizer(network, lr=0.01 * (1 + number), l2=0.01 * number, momentum=momentum)
        for number, network in enumerate(networks)
    ]


def assert_equal_states(found: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for (name, one), other in zip(
        found.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, msg=name)
