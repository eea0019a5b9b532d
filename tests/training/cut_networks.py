"""Small convolutional networks, and masks that remove much of them."""

import torch
import torch.nn.functional as F
from torch import nn

from lossprune.pruning import Mask
from lossprune.training import make_optimizer
from tests.training.stacks import drawn, seeded

CURVE = 2e-5  # of weights after two epochs in float32, where sums have other orders


class Residual(nn.Module):
    """Two convolutions around which the images go, batch norm before each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 9, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 9, 1, stride=2)
        self.head = nn.Linear(9, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = self.shortcut(x) + self.conv2(F.relu(self.bn2(self.conv1(x))))
        return self.head(F.relu(x).mean((2, 3)))


def residual() -> nn.Module:
    return drawn(Residual(), 1)


def plain() -> nn.Module:
    return drawn(
        nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 10, 3),
            nn.ReLU(), nn.Flatten(), nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 10),
        ),
        2,
    )  # fmt: skip


def cutting(network: nn.Module) -> Mask:
    """A mask that removes much, and every third channel or unit of what each layer reads."""
    generator = seeded(7)
    kept = {
        name: torch.rand(all_of.shape, generator=generator) < 0.4
        for name, all_of in Mask.dense(network).items()
    }
    for left in kept.values():
        if left.shape[1] > 1:
            left[:, ::3] = False
    return Mask(kept)


def begun(network: nn.Module, mask: Mask, **options: float) -> torch.optim.SGD:
    optimizer = make_optimizer(network, **({"lr": 0.02, "l2": 0.01} | options))
    mask.enforce(network, optimizer)
    return optimizer


def close(found: nn.Module, expected: nn.Module, *, statistics: bool) -> None:
    for name, value in expected.state_dict().items():
        if statistics or "running" not in name:
            torch.testing.assert_close(
                found.state_dict()[name], value, atol=CURVE, rtol=0, msg=name
            )
