"""The steps of a sparse network, in no layout yet: what the compiled kernels can do.

Shapes are those of one image: (channels, height, width).  A linear layer is a convolution whose
kernel covers the whole map: (outputs, channels · height · width) weights are (outputs, channels,
height, width) ones, so that ``flatten`` moves nothing.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lossprune.deployment.sparse.token_steps import TokenOperation, token_channels
from lossprune.deployment.sparse.windows import (
    MapAverage,
    MapMaximum,
    MapMean,
    MapNearest,
    Pair,
    windows,
)
from lossprune.kernels.interface import Activation
from lossprune.pruning.errors import PruningError

Shape = tuple[int, int, int]
Numbers = tuple[float, float]
LARGEST = 16  # positions of a tile, each a vector of sums in a register


@dataclass(frozen=True)
class SparseConvolution:
    """Sums of kept weights times inputs and a bias, plus a second value where one is read.

    Attributes:
        weight_shape: (outputs, inputs / groups, height, width).
        stride, padding, dilation: (vertical, horizontal).
        groups: of input and output channels.
        flat: a linear layer: (outputs, inputs, 1, 1) weights, whose inputs are the whole map.
        activation: of the sums.
        numbers: of the activation: the bounds of a clamp; the slope of a leaky ReLU or the factor
            of an ELU, and 0.
        pool: 2: the maximum over 2×2 positions is taken after the activation; else 1.
    """

    weight_shape: tuple[int, int, int, int]
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    flat: bool = False
    activation: Activation = Activation.IDENTITY
    pool: int = 1
    numbers: Numbers = (0.0, 0.0)

    def kernel(self, source: Shape) -> tuple[int, int, int, int]:
        """Return (outputs, inputs / groups, height, width) on a map of this shape."""
        return (self.weight_shape[0], *source) if self.flat else self.weight_shape

    def convolved(self, source: Shape) -> Shape:
        """Return the shape of the output before its maximum; below 1 where the kernel is larger."""
        outputs, _, *kernel = self.kernel(source)
        height, width = (
            (extent + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
            for extent, pad, dilation, taps, stride in zip(
                source[1:], self.padding, self.dilation, kernel, self.stride, strict=True
            )
        )
        return outputs, height, width


@dataclass(frozen=True)
class ChannelScales:
    """activation(scale · x + shift), one scale and shift for each of ``channels``."""

    channels: int
    activation: Activation = Activation.IDENTITY
    numbers: Numbers = (0.0, 0.0)


@dataclass(frozen=True)
class MapActivation:
    """activation(x), for as many channels as there are."""

    activation: Activation
    numbers: Numbers = (0.0, 0.0)


@dataclass(frozen=True)
class MapSum:
    """activation(x + y), or activation(x − y) if ``minus``.

    Attributes:
        spread: whether y has one number a channel, for all positions.
    """

    activation: Activation = Activation.IDENTITY
    numbers: Numbers = (0.0, 0.0)
    spread: bool = False
    minus: bool = False


@dataclass(frozen=True)
class MapProduct:
    """activation(x · y); ``spread`` as in :class:`MapSum`."""

    activation: Activation = Activation.IDENTITY
    numbers: Numbers = (0.0, 0.0)
    spread: bool = False


@dataclass(frozen=True)
class MapNorm:
    """A norm over the channels at each position, as :class:`RowNorm` is over features."""

    channels: int
    epsilon: float
    centred: bool = True


@dataclass(frozen=True)
class MapJoin:
    """The channels of x, then those of y."""


@dataclass(frozen=True)
class MapSplit:
    """Channel c's positions (y, x) = (i, j) modulo ``stride`` as channel (c, i, j)."""

    stride: Pair


SparseOperation = (
    SparseConvolution | ChannelScales | MapActivation | MapSum | MapProduct | MapNorm | MapJoin
    | MapMaximum | MapAverage | MapMean | MapNearest | MapSplit | TokenOperation
)  # fmt: skip


@dataclass(frozen=True)
class SparseStep:
    """``target`` ← operation(``reads``).

    Attributes:
        name: of the layer, as the model names it.
        reads: the values that are read: the second one of a convolution is added; queries, keys
            and values of attention.
        target: the value that is written; no two steps write the same.
        operation: what is computed.
    """

    name: str
    reads: tuple[str, ...]
    target: str
    operation: SparseOperation

    @property
    def source(self) -> str:
        """The value that is read first."""
        return self.reads[0]


@dataclass(frozen=True)
class Weights:
    """What a step multiplies with; what it has none of is empty.

    Attributes:
        shift: (channels,), of scales; a convolution's bias.
        scale: (channels,), of scales.
        positions: int64 (kept,), ascending, where the kept weights are in the flattened weight.
        values: (kept,).
    """

    shift: Tensor = field(default_factory=lambda: torch.zeros(0))
    scale: Tensor = field(default_factory=lambda: torch.zeros(0))
    positions: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    values: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def kept(cls, weight: Tensor, bias: Tensor | None) -> "Weights":
        """Return the nonzero entries of a convolution's ``weight``."""
        flat = weight.detach().reshape(-1)
        positions = flat.nonzero().reshape(-1)
        shift = torch.zeros(weight.shape[0]) if bias is None else bias.detach().clone()
        return cls(shift, positions=positions, values=flat[positions])


def output_shape(step: SparseStep, shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape of what a step writes, given those of what it reads.

    Raises:
        PruningError: what it reads does not fit it.
    """
    source = shapes[step.source]
    channels, height, width = source
    match step.operation:
        case SparseConvolution(pool=pool) as convolution:
            _check_kernel(step.name, convolution, source)
            channels, height, width = convolution.convolved(source)
            height, width = height // pool, width // pool
        case ChannelScales(channels=scales) | MapNorm(channels=scales) if scales != channels:
            raise PruningError(f"{step.name} takes {scales} channels, its input has shape {source}")
        case MapMaximum() | MapAverage() | MapMean() | MapNearest() as operation:
            height, width = (
                len(windows(operation, axis, extent)) for axis, extent in enumerate(source[1:])
            )
        case MapJoin():
            return _joined_shape(step, shapes)
        case operation if isinstance(operation, TokenOperation):
            own = [shapes[name] for name in step.reads]
            if any(shape[1:] != (1, 1) for shape in own):
                raise PruningError(f"{step.name} takes rows of features, its inputs are {own}")
            return token_channels(step.name, operation, [shape[0] for shape in own]), 1, 1
        case MapSplit(stride=(vertical, horizontal)):
            return channels * vertical * horizontal, -(-height // vertical), -(-width // horizontal)
    if min(height, width) < 1:
        what = "mean" if isinstance(step.operation, MapAverage) else "maximum"
        raise PruningError(f"{step.name}: no window of its {what} fits its input {source}")
    made = channels, height, width
    spread = getattr(step.operation, "spread", False)
    wanted = (channels, 1, 1) if spread else made
    for other in step.reads[1:]:  # alike at the example's size, and perhaps not at this one
        if shapes[other] != wanted:
            raise PruningError(
                f"{step.name}: maps of shapes {made} and {shapes[other]} meet here, "
                f"{'the second with one position' if spread else 'which were of one shape'} "
                "in the example"
            )
    return made


def _joined_shape(step: SparseStep, shapes: Mapping[str, Shape]) -> Shape:
    (first, *extents), (second, *others) = (shapes[name] for name in step.reads)
    if extents != others:
        raise PruningError(
            f"{step.name}: maps of {extents} and {others} positions are joined here, which were of "
            "one size in the example"
        )
    return first + second, extents[0], extents[1]


def flattened(
    steps: Sequence[SparseStep], inputs: Mapping[str, Shape], outputs: Collection[str]
) -> dict[str, Shape] | None:
    """Return the inputs as rows of features, where steps give the same on those.

    So they do where all that reads or is a map of several positions is linear layers.
    """
    maps = {name for name, (_, *extents) in inputs.items() if extents != [1, 1]}
    if maps & set(outputs):
        return None
    for step in steps:
        match step.operation:
            case SparseConvolution(flat=True):
                continue
        known = ChannelScales | MapSum | MapProduct | MapJoin | TokenOperation
        if not isinstance(step.operation, known) or maps & {*step.reads}:
            return None
    return {name: (math.prod(shape), 1, 1) for name, shape in inputs.items()}


def _check_kernel(name: str, convolution: SparseConvolution, source: Shape) -> None:
    channels, height, width = source
    inputs = convolution.weight_shape[1]
    if convolution.flat and channels * height * width != inputs:
        raise PruningError(f"{name} takes {inputs} inputs, its input has shape {source}")
    if not convolution.flat and inputs * convolution.groups != channels:
        raise PruningError(
            f"{name} takes {inputs * convolution.groups} channels, its input has shape {source}"
        )
    if min(convolution.convolved(source)[1:]) < 1:
        raise PruningError(f"{name}: its kernel is larger than its input {source}")


def tiles(convolution: SparseConvolution, source: Shape) -> list[Pair]:
    """Return the tiles (rows, columns) that fit a convolution's output, the best guess first.

    A tile is the positions that a kernel computes together over a block of images.  The best guess
    computes the fewest positions, a tile at an edge being whole, and among those is the largest.
    """
    _, height, width = convolution.convolved(source)
    pool = convolution.pool
    height, width = (extent // pool * pool for extent in (height, width))
    wide = (1, 2, 4, 8) if convolution.stride[1] <= 2 else (1,)
    fitting = [
        (rows, columns)
        for rows in (1, 2, 4)
        for columns in wide
        if rows * columns <= LARGEST and rows <= height and columns <= width
        and rows % pool == 0 and columns % pool == 0 and (rows, columns) != (4, 8)
    ]  # fmt: skip

    def cost(tile: Pair) -> tuple[int, int]:
        rows, columns = tile
        return -(-height // rows) * rows * -(-width // columns) * columns, -rows * columns

    return sorted(fitting, key=cost)
