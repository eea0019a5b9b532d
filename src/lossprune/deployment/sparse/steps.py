"""The steps of a sparse network, in no layout yet: what the compiled kernels can do.

Shapes are those of one image: (channels, height, width).  A linear layer is a convolution whose
kernel covers the whole map: (outputs, channels · height · width) weights are (outputs, channels,
height, width) ones, so that ``flatten`` moves nothing.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from lossprune.pruning.errors import PruningError

Shape = tuple[int, int, int]

IDENTITY, RELU, TANH = range(3)


@dataclass(frozen=True)
class Step:
    """One operation: ``target`` ← activation(operation(``source``)).

    Attributes:
        kind: "convolution", "affine", "addition", "maximum" or "mean".
        name: of the layer, as the model names it.
        source: the value that is read.
        target: the value that is written.
        other: a value that is added before the activation.
        activation: IDENTITY, RELU or TANH.
        pool: 2: after a convolution and its activation, the maximum over 2×2 positions; else 1.
        weight_shape: of a convolution, (outputs, inputs / groups, height, width).
        stride, padding, dilation, size: (vertical, horizontal).
        groups: of a convolution.
        tile: accumulators of a convolution over blocks of images, (rows, columns); None: chosen
            by :func:`tiles`.
    """

    kind: str
    name: str
    source: str
    target: str
    other: str | None = None
    activation: int = IDENTITY
    pool: int = 1
    weight_shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    size: tuple[int, int] = (1, 1)
    groups: int = 1
    flat: bool = False
    tile: tuple[int, int] | None = None

    def convolved(self, source: Shape) -> Shape:
        """Return the shape of a convolution's output before its maximum.

        Raises:
            PruningError: the input does not fit the weights.
        """
        outputs, inputs, *kernel = self._kernel(source)
        if inputs * self.groups != source[0]:
            raise PruningError(
                f"{self.name} takes {inputs * self.groups} channels, its input has shape {source}"
            )
        height, width = (
            (extent + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
            for extent, pad, dilation, taps, stride in zip(
                source[1:], self.padding, self.dilation, kernel, self.stride, strict=True
            )
        )
        if min(height, width) < 1:
            raise PruningError(f"{self.name}: its kernel is larger than its input {source}")
        return outputs, height, width

    def _kernel(self, source: Shape) -> tuple[int, ...]:
        if not self.flat:
            return self.weight_shape
        outputs, inputs = self.weight_shape[:2]
        channels, height, width = source
        if channels * height * width != inputs:
            raise PruningError(f"{self.name} takes {inputs} inputs, its input has shape {source}")
        return outputs, channels, height, width

    def output(self, source: Shape) -> Shape:
        """Return the shape of the step's output.

        Raises:
            PruningError: the input does not fit the step.
        """
        channels, height, width = source
        if self.kind == "convolution":
            channels, height, width = self.convolved(source)
            height, width = height // self.pool, width // self.pool
        elif self.kind == "maximum":
            height = (height - self.size[0]) // self.stride[0] + 1
            width = (width - self.size[1]) // self.stride[1] + 1
        elif self.kind == "mean":
            height = width = 1
        if min(height, width) < 1:
            raise PruningError(f"{self.name}: no window of its maximum fits its input {source}")
        return channels, height, width

    def taps(self, positions: Tensor, source: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (output, input channel, dy, dx) of each kept weight.

        Output position (y, x) reads input position (y · stride + dy, x · stride + dx).

        Args:
            positions: int64 (kept,), where the kept weights are in the flattened weight.
            source: the input's shape.
        """
        outputs, inputs, height, width = self._kernel(source)
        dx = positions % width
        dy = positions // width % height
        channel = positions // (width * height) % inputs
        output = positions // (width * height * inputs)
        channel = channel + output // (outputs // self.groups) * inputs
        return (
            output,
            channel,
            dy * self.dilation[0] - self.padding[0],
            dx * self.dilation[1] - self.padding[1],
        )

    def replace(self, **changes: object) -> "Step":
        """Return the step with some of its attributes changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Weights:
    """What a step multiplies with: ``scale`` and ``shift`` per channel, or kept weights.

    Attributes:
        shift: (channels,), a convolution's bias.
        scale: (channels,), of an affine step.
        positions: int64 (kept,), ascending, where the kept weights are in the flattened weight.
        values: (kept,).
    """

    shift: Tensor
    scale: Tensor
    positions: Tensor
    values: Tensor

    @classmethod
    def kept(cls, weight: Tensor, bias: Tensor | None) -> "Weights":
        """Return the nonzero entries of ``weight``."""
        flat = weight.detach().reshape(-1)
        positions = flat.nonzero().reshape(-1)
        shift = torch.zeros(weight.shape[0]) if bias is None else bias.detach().clone()
        return cls(shift, torch.zeros(0), positions, flat[positions])

    @classmethod
    def affine(cls, scale: Tensor, shift: Tensor) -> "Weights":
        """Return an affine step's."""
        none = torch.zeros(0)
        return cls(shift.float(), scale.float(), none.long(), none)


def tiles(step: Step, source: Shape, most: int = 16) -> list[tuple[int, int]]:
    """Return the tiles (rows, columns) that fit a convolution's output, the best guess first.

    The best guess computes the fewest positions, a tile at an edge being whole, and among those
    is the largest.
    """
    _, height, width = step.convolved(source)
    height, width = (extent // step.pool * step.pool for extent in (height, width))
    wide = (1, 2, 4, 8) if step.stride[1] <= 2 else (1,)
    fitting = [
        (rows, columns)
        for rows in (1, 2, 4)
        for columns in wide
        if rows * columns <= most and rows <= height and columns <= width
        and rows % step.pool == 0 and columns % step.pool == 0 and (rows, columns) != (4, 8)
    ]  # fmt: skip

    def cost(tile: tuple[int, int]) -> tuple[int, int]:
        rows, columns = tile
        return -(-height // rows) * rows * -(-width // columns) * columns, -rows * columns

    return sorted(fitting, key=cost)
