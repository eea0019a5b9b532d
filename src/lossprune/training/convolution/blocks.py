"""Blocks of images: the layout in which all layers work, and the way into it and out of it.

A value (n, channels, height, width) is kept as (blocks, height, channels, width, lanes): ``lanes``
images innermost, as many as a vector of this machine holds.  In the last block there may be fewer;
what lanes without an image hold is of no meaning, and their gradients are 0.  It is a tensor like
any other, so that functions of each number by itself, and sums, are torch's own.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossprune.pruning.errors import PruningError
from lossprune.training.convolution.kernel import lanes
from lossprune.training.convolution.memory import POOL


def packed(x: Tensor, dimensions: int | None = None) -> Tensor:
    """Return (n, channels, height, width) or (n, features) as blocks; ``dimensions`` if so many."""
    if dimensions is not None and x.dim() != dimensions:
        raise PruningError(f"a batch like the example has {dimensions} dimensions, not {x.dim()}")
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise PruningError(f"sparse training is in float32 on the CPU, not {x.dtype} on {x.device}")
    return _Pack.apply(x)


def unpacked(blocks: Tensor, images: int, flat: bool = False) -> Tensor:
    """Return blocks as (images, channels, height, width); ``flat``: as (images, features)."""
    x = _Unpack.apply(blocks, images)
    return x.flatten(1) if flat else x


def images_of(x: Tensor) -> int:
    """Return how many images there are; by a call, as a graph may hold it."""
    return x.shape[0]


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return _to_blocks(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # type: ignore[override]
        (gradient,) = grad_outputs
        return _from_blocks(gradient, ctx.shape[0]).view(ctx.shape)


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, images: int) -> Tensor:
        return _from_blocks(blocks, images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = grad_outputs
        return _to_blocks(gradient), None


def _to_blocks(x: Tensor) -> Tensor:
    images, channels, height, width = x.shape if x.dim() == 4 else (*x.shape, 1, 1)
    count = math.ceil(images / lanes())
    out = POOL.empty((count, height, channels, width, lanes()))
    x = x.reshape(images, channels, height, width)
    whole = images // lanes()
    cut = whole * lanes()
    out[:whole].copy_(x[:cut].unflatten(0, (whole, lanes())).permute(0, 3, 2, 4, 1))
    if whole < count:
        rest = F.pad(x[cut:], (0, 0, 0, 0, 0, 0, 0, count * lanes() - images))
        out[whole].copy_(rest.permute(2, 1, 3, 0))
    return out


def _from_blocks(blocks: Tensor, images: int) -> Tensor:
    """A tensor in torch's usual layout that is no view: it may be changed in place."""
    _, height, channels, width, _ = blocks.shape
    out = blocks.new_empty((images, channels, height, width))
    whole = images // lanes()
    cut = whole * lanes()
    out[:cut].unflatten(0, (whole, lanes())).copy_(blocks[:whole].permute(0, 4, 2, 1, 3))
    if cut < images:
        out[cut:].copy_(blocks[whole, ..., : images - cut].permute(3, 1, 0, 2))
    return out
