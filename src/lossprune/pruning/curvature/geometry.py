"""What the entries of a weight meet: inputs and output gradients, by output position.

Index letters, here and in ``squares.py``: n example, k column of the Hessian factor, g group,
o output channel within its group, i input of one output (channel within its group × kernel
position), p output position (pixel or token).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ over the last dimension; every dimension between it and the first is a position.

    Attributes:
        transposed: whether the weight is stored as Wᵀ, (inputs, outputs).
    """

    transposed: bool = False

    def patches(self, inputs: Tensor) -> Tensor:
        """Inputs of every output position: (n, 1, i, p)."""
        return inputs.reshape(inputs.shape[0], 1, -1, inputs.shape[-1]).transpose(2, 3)

    def squares(self, inputs: Tensor) -> Tensor:
        """Sum of |x|² over examples and positions: (1, i)."""
        return _squared(inputs).reshape(-1, inputs.shape[-1]).sum(0)[None]

    def columns(self, gradients: Tensor) -> Tensor:
        """Gradients (n, k, *output) by output and position: (n, k, 1, o, p)."""
        n, k, *_, o = gradients.shape
        return gradients.reshape(n, k, 1, -1, o).transpose(3, 4)

    def positions(self, output: torch.Size) -> int:
        """Count the positions of an output of that shape."""
        return output[1:-1].numel()

    def grouped(self, weight: Tensor) -> Tensor:
        """View of the weight, or of what belongs to it, as (g, o, i)."""
        return (weight.T if self.transposed else weight)[None]


@dataclass(frozen=True)
class Convolution:
    """A 1-, 2- or 3-dimensional convolution (cross-correlation)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, per dimension
    dilation: tuple[int, ...]
    groups: int

    def patches(self, inputs: Tensor) -> Tensor:
        """Inputs of every output position: (n, g, i, p)."""
        windows = self._windows(inputs)
        positions = windows.shape[2 + len(self.kernel) :].numel()
        return windows.reshape(len(inputs), self.groups, -1, positions)

    def squares(self, inputs: Tensor) -> Tensor:
        """Sum of |x|² over examples and the positions that each kernel position sees: (g, i)."""
        if inputs.ndim < 2 + len(self.kernel):  # one example, without a dimension of its own
            inputs = inputs[None]
        windows = self._windows(_squared(inputs))
        positions = range(2 + len(self.kernel), windows.ndim)
        return windows.sum((0, *positions)).reshape(self.groups, -1)

    def _windows(self, inputs: Tensor) -> Tensor:
        """What each kernel position sees: (n, channel, *kernel, *positions), a view."""
        dimensions = len(self.kernel)
        if any(pad != (0, 0) for pad in self.padding):
            inputs = F.pad(inputs, [side for pad in reversed(self.padding) for side in pad])
        windows = inputs
        for axis, (size, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True), start=2
        ):
            windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # (n, channel, *positions, *kernel) → (n, channel, *kernel, *positions)
        kernel_axes = range(2 + dimensions, 2 + 2 * dimensions)
        return windows.permute(0, 1, *kernel_axes, *range(2, 2 + dimensions))

    def columns(self, gradients: Tensor) -> Tensor:
        """Gradients (n, k, *output) by output and position: (n, k, g, o, p)."""
        n, k, channels = gradients.shape[:3]
        return gradients.reshape(n, k, self.groups, channels // self.groups, -1)

    def positions(self, output: torch.Size) -> int:
        """Count the positions of an output of that shape."""
        return output[2:].numel()

    def grouped(self, weight: Tensor) -> Tensor:
        """View of the weight, or of what belongs to it, as (g, o, i)."""
        return weight.view(self.groups, weight.shape[0] // self.groups, -1)


@dataclass(frozen=True)
class TransposedConvolution:
    """A transposed convolution: outputs are to inputs as a convolution's inputs to its outputs.

    Attributes:
        reverse: that convolution, whose patches are here those of the gradients.
        places: the sizes of the inputs, whose positions are here those of a weight.
    """

    reverse: Convolution
    places: tuple[int, ...]

    def patches(self, inputs: Tensor) -> Tensor:
        """Inputs by position: (n, g, i, p)."""
        return inputs.reshape(inputs.shape[0], self.reverse.groups, -1, math.prod(self.places))

    def squares(self, inputs: Tensor) -> Tensor:
        """Sum of |x|² over examples and places: (g, i)."""
        squares = _squared(inputs).flatten(2).sum((0, 2))
        return squares.reshape(self.reverse.groups, -1)

    def columns(self, gradients: Tensor) -> Tensor:
        """What each input position and kernel position leads to: (n, k, g, o · kernel, p)."""
        patches = self.reverse.patches(gradients.flatten(0, 1))
        return patches.unflatten(0, gradients.shape[:2])

    def positions(self, output: torch.Size) -> int:
        """Count the positions of the input."""
        return math.prod(self.places)

    def grouped(self, weight: Tensor) -> Tensor:
        """View of the weight (i, o, *kernel), or of what belongs to it, as (g, o · kernel, i)."""
        groups = self.reverse.groups
        return weight.view(groups, weight.shape[0] // groups, -1).transpose(1, 2)


def _squared(inputs: Tensor) -> Tensor:
    """|x|², in float32 or wider: the squares of 16 bits overflow."""
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    return wide.abs().square() if wide.is_complex() else wide.square()


@dataclass(frozen=True)
class Lookup:
    """Rows of a weight (rows, features) by their numbers: a product of one-hot inputs with it.

    Attributes:
        padding: the row that gets no gradient, if any.
    """

    padding: int | None = None

    def columns(self, gradients: Tensor) -> Tensor:
        """Gradients (n, k, *output) by position: (n, k, p, i)."""
        n, k, *_, i = gradients.shape
        return gradients.reshape(n, k, -1, i)

    def patches(self, inputs: Tensor) -> Tensor:
        """Which row each position looks up: (n, p)."""
        return inputs.reshape(inputs.shape[0], -1)

    def squares(self, inputs: Tensor) -> Tensor:
        """Raise: nothing is multiplied by an input."""
        raise NotImplementedError

    def positions(self, output: torch.Size) -> int:
        """Count the positions of an output of that shape."""
        return output[1:-1].numel()

    def grouped(self, weight: Tensor) -> Tensor:
        """View of the weight, or of what belongs to it, as (1, rows, i)."""
        return weight[None]


Geometry = Linear | Convolution | TransposedConvolution | Lookup


def layout(geometry: Geometry) -> tuple[Any, ...]:
    """Return what two uses of one weight must have in common to be seen as positions of one."""
    if isinstance(geometry, Lookup):  # as in a head that shares it
        return Linear, False
    if isinstance(geometry, Linear):
        return Linear, geometry.transposed
    convolution = geometry if isinstance(geometry, Convolution) else geometry.reverse
    return type(geometry), convolution.groups
