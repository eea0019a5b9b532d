"""Residual networks for photographs (He et al., "Deep Residual Learning", 2015).

A 7×7 stem and a maximum, each of stride 2, four layers of blocks, the last three of which halve the
map, a mean over the map and a linear classifier. A bottleneck has its stride in the 3×3
convolution, not in the first 1×1 as in the paper ("version 1.5"): that is what the networks in
common use are, and it costs no parameters. Weights bear torchvision's names, so that its state
dicts, and those of whoever follows it, load.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lossprune.networks.building import checked_shape

WIDTHS = (64, 128, 256, 512)
# Blocks in each layer (a group, in the pre-activation networks), and whether they are bottlenecks:
# table 1 of the paper.
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
EXPANSION = 4


def resnet(*, depth: int, shape: Sequence[int] = (3, 224, 224), classes: int = 1000) -> nn.Module:
    """Return the network of ``depth`` 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).

    Images of any height and width are taken; the last map has ⌈height / 32⌉ × ⌈width / 32⌉
    positions, so that of 32×32 images it has one.

    Raises:
        ValueError: ``shape`` or ``classes`` is not made of whole numbers of at least 1.
    """
    channels, _, _ = checked_shape(f"ResNet{depth}", shape, classes)
    blocks, bottleneck = DEPTHS[depth]
    return ResNet(channels, classes, blocks, Bottleneck if bottleneck else Basic)


class Basic(nn.Module):
    """Two 3×3 convolutions: x ↦ ReLU(shortcut + F(x))."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.outputs = width
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(inputs, self.outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, ⌈h/stride⌉, ⌈w/stride⌉)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolutions; 4 · width channels leave."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.outputs = EXPANSION * width
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, self.outputs, 1)
        self.bn3 = nn.BatchNorm2d(self.outputs)
        self.downsample = _projection(inputs, self.outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, ⌈h/stride⌉, ⌈w/stride⌉)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stem → four layers of blocks → mean over the map → classifier."""

    def __init__(
        self,
        channels: int,
        classes: int,
        blocks: Sequence[int],
        block: type[Basic] | type[Bottleneck],
    ):
        super().__init__()
        self.conv1 = conv(channels, WIDTHS[0], 7, stride=2)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        first, second, third, fourth = WIDTHS
        inputs = first
        self.layer1, inputs = layer(block, inputs, first, blocks[0], stride=1)
        self.layer2, inputs = layer(block, inputs, second, blocks[1], stride=2)
        self.layer3, inputs = layer(block, inputs, third, blocks[2], stride=2)
        self.layer4, inputs = layer(block, inputs, fourth, blocks[3], stride=2)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, h, w) to logits (n, classes)."""
        maps = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.fc(F.adaptive_avg_pool2d(maps, 1).flatten(1))


def layer(
    block: Callable[[int, int, int], Any], inputs: int, width: int, count: int, stride: int
) -> tuple[nn.Sequential, int]:
    """Return ``count`` blocks, the first with the stride, and how many channels leave them."""
    first = block(inputs, width, stride)
    rest = (block(first.outputs, width, 1) for _ in range(count - 1))
    return nn.Sequential(first, *rest), first.outputs


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size of the map, but for its stride."""
    return nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Return what fits x to a block that changes size or width; None: x fits as it is."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
