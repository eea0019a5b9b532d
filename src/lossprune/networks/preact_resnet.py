"""Pre-activation residual networks (He et al., "Identity Mappings in Deep Residual Networks").

The variant for small images: a 3×3 stem that keeps the size, four groups of blocks, the last three
of which halve it, and a 1×1 convolution as the classifier with a batch norm on its outputs.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lossprune.networks.building import checked_shape
from lossprune.networks.resnet import DEPTHS, EXPANSION, WIDTHS, conv, layer

STRIDES = (1, 2, 2, 2)


def preact_resnet(
    *, depth: int, shape: Sequence[int] = (3, 32, 32), classes: int = 10
) -> nn.Module:
    """Return the network of ``depth`` 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).

    The published 4×4 pool, which on 32×32 images covers the whole map, is a global one here, so
    that images of any height and width are taken.

    Raises:
        ValueError: ``shape`` or ``classes`` is not made of whole numbers of at least 1.
    """
    channels, _, _ = checked_shape(f"PreActResNet{depth}", shape, classes)
    blocks, bottleneck = DEPTHS[depth]
    return PreActResNet(channels, classes, blocks, PreActBottleneck if bottleneck else PreActBasic)


class PreActBasic(nn.Module):
    """Two 3×3 convolutions, each after batch norm and ReLU: x ↦ shortcut + F(x)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.outputs = width
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.shortcut = _shortcut(inputs, self.outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, ⌈h/stride⌉, ⌈w/stride⌉)."""
        active = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(active)
        out = self.conv1(active)
        return identity + self.conv2(F.relu(self.bn2(out)))


class PreActBottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions, each after batch norm and ReLU; 4 · width channels leave."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.outputs = EXPANSION * width
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, self.outputs, 1)
        self.shortcut = _shortcut(inputs, self.outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, inputs, h, w) to (n, outputs, ⌈h/stride⌉, ⌈w/stride⌉)."""
        active = F.relu(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(active)
        out = self.conv1(active)
        out = self.conv2(F.relu(self.bn2(out)))
        return identity + self.conv3(F.relu(self.bn3(out)))


class PreActResNet(nn.Module):
    """Stem → four groups of blocks → batch norm, ReLU, mean over the map → classifier."""

    def __init__(
        self,
        channels: int,
        classes: int,
        blocks: Sequence[int],
        block: type[PreActBasic] | type[PreActBottleneck],
    ):
        super().__init__()
        self.stem = conv(channels, WIDTHS[0], 3)
        width_in = WIDTHS[0]
        groups = []
        for width, stride, count in zip(WIDTHS, STRIDES, blocks, strict=True):
            group, width_in = layer(block, width_in, width, count, stride)
            groups.append(group)
        self.groups = nn.Sequential(*groups)
        self.bn = nn.BatchNorm2d(width_in)
        self.classifier = conv(width_in, classes, 1)
        self.bn_outputs = nn.BatchNorm2d(classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, h, w) to logits (n, classes)."""
        maps = F.relu(self.bn(self.groups(self.stem(x))))
        pooled = F.adaptive_avg_pool2d(maps, 1)
        return self.bn_outputs(self.classifier(pooled)).flatten(1)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Conv2d | None:
    """Return a projection where the block changes size or width; None: the identity."""
    return None if stride == 1 and inputs == outputs else conv(inputs, outputs, 1, stride)
