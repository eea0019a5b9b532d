"""Maxima and means over windows of blocks of images, for maps of any size."""

import torch.nn.functional as F
from torch import Tensor

from lossprune.training.convolution.functions import Maximum
from lossprune.training.convolution.geometry import Pair


def mean(blocks: Tensor) -> Tensor:
    """Return the means of all positions."""
    return blocks.mean((1, 3), keepdim=True)


def maxima(
    blocks: Tensor, size: Pair, stride: Pair, padding: Pair, *, rectified: bool = False
) -> Tensor:
    """Return the maxima over windows, of what a ReLU gives whose gradient is gated here or not."""
    return Maximum(size, stride, padding, rectified)(blocks)


def adaptive_means(blocks: Tensor, wanted: Pair) -> Tensor:
    """Return so many means, in rows and columns, whatever the size of the maps."""
    if wanted == (1, 1):
        return mean(blocks)
    if wanted == (blocks.shape[1], blocks.shape[3]):
        return blocks
    images = blocks.permute(0, 4, 2, 1, 3)
    found = F.adaptive_avg_pool2d(images.flatten(0, 1), wanted)
    return found.unflatten(0, images.shape[:2]).permute(0, 3, 2, 4, 1)


def means(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Return the means over windows that lie side by side."""
    _, height, _, width, _ = blocks.shape
    blocks = blocks[:, : height // rows * rows, :, : width // columns * columns]
    return blocks.unflatten(3, (-1, columns)).unflatten(1, (-1, rows)).mean((2, 5))
