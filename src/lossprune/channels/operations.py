"""How channels pass through operations without weights: what comes out, and what is read.

Every operation has ``forward``, from the channels of its inputs to those of its output, and
``backward``, from which channels of its output are of use to which of each input it needs for that.
Linear and convolution layers are in ``layers.py``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lossprune.channels.values import ChannelGroups, Channels, Unknown, Value


class UnknownEffectError(Exception):
    """An operation's effect on channels is not known; the message says of what."""


class Operation:
    """One operation of the graph."""

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        """Return what is known of the output; raises :class:`UnknownEffectError`."""
        raise NotImplementedError

    def backward(self, useful: Tensor, inputs: Sequence[Value]) -> list[Tensor]:
        """Return which channels of each input the ``useful`` ones of the output depend on.

        Those at the same places, unless an operation says otherwise.
        """
        return [useful] * len(inputs)


def only(inputs: Sequence[Value]) -> Channels:
    """Return the channels of the one input there is."""
    (value,) = inputs
    assert isinstance(value, Channels)
    return value


@dataclass(frozen=True)
class Pointwise(Operation):
    """A function of each number by itself, or one that leaves constants as they are.

    Attributes:
        name: of torch's function, such as "relu", or "gelu_tanh"; "identity" of all that do nothing
            in evaluation.
        function: of the numbers.
        arguments: of torch's function that decide what it computes, by name; of arithmetic with a
            number the two sides, "left" and "right", the tensor's being None.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        channels = only(inputs)
        return channels.mapped(self.function(channels.constant.clone()))


@dataclass(frozen=True)
class Pooling(Operation):
    """A mean or maximum over windows of the last ``dimensions`` dimensions.

    Attributes:
        kind: "max", "avg", "adaptive_max" or "adaptive_avg"; or "nearest", of windows of one
            position, some of which come several times.
        dimensions: of the positions.
        arguments: of torch's function for it, by name.
    """

    kind: str
    dimensions: int
    arguments: Mapping[str, Any]

    @property
    def rescales(self) -> bool:
        """Whether its means count zeros at the border, or divide by another number than theirs."""
        if self.kind != "avg":
            return False
        padding = self.arguments["padding"]
        padded = padding != 0 if isinstance(padding, int) else any(padding)
        counted = padded and bool(self.arguments["count_include_pad"])
        return counted or self.arguments["divisor_override"] is not None

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        channels = only(inputs)
        if channels.axis != -1 - self.dimensions or channels.flattened:
            raise UnknownEffectError("a pooling over channels")
        if not self.rescales:
            return channels
        constant = channels.constant  # only 0 stays the same everywhere
        return replace(channels, constant=constant.masked_fill(constant != 0, math.nan))


@dataclass(frozen=True)
class Mean(Operation):
    """A mean over these dimensions, which are those of the positions."""

    dimensions: frozenset[int]
    keep: bool

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        channels = only(inputs)
        rank = 1 - channels.axis
        places = {d % rank for d in self.dimensions if -rank <= d < rank}
        if channels.flattened or places != set(range(2, rank)):
            raise UnknownEffectError("a mean over other dimensions than all positions")
        return channels if self.keep else replace(channels, axis=-1)


@dataclass(frozen=True)
class Flatten(Operation):
    """All dimensions but the first made one."""

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        channels = only(inputs)
        if channels.flattened:
            return channels
        return replace(channels, axis=-1, flattened="fast" if channels.axis == -1 else "slow")


@dataclass(frozen=True)
class Sum(Operation):
    """a + b, or a − b with ``sign`` −1."""

    sign: int = 1

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        a, b = _aligned(inputs, groups)
        return replace(a, live=a.live | b.live, constant=a.constant + self.sign * b.constant)


@dataclass(frozen=True)
class Product(Operation):
    """a · b, number by number."""

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        a, b = _aligned(inputs, groups)
        zero = (a.constant == 0) | (b.constant == 0)
        constant = torch.where(zero, 0.0, a.constant * b.constant)
        return replace(a, live=(a.live | b.live) & ~zero, constant=constant)

    def backward(self, useful: Tensor, inputs: Sequence[Value]) -> list[Tensor]:
        a, b = (only([value]) for value in inputs)
        read = useful & (a.constant != 0) & (b.constant != 0)
        return [read, read]


@dataclass(frozen=True)
class Concatenation(Operation):
    """Tensors side by side along ``dimension``, which is that of their channels."""

    dimension: int

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        channels = [part for part in inputs if isinstance(part, Channels)]
        if len(channels) < len(inputs) or len({part.axis for part in channels}) > 1:
            raise UnknownEffectError("a concatenation of tensors of different kinds")
        axis = channels[0].axis
        if any(part.flattened for part in channels) or self.dimension not in (1, axis):
            raise UnknownEffectError("a concatenation of other dimensions than the channels")
        return Channels(
            torch.cat([part.groups for part in channels]),
            torch.cat([part.live for part in channels]),
            torch.cat([part.constant for part in channels]),
            axis,
        )

    def backward(self, useful: Tensor, inputs: Sequence[Value]) -> list[Tensor]:
        return list(useful.split([len(part) for part in inputs if isinstance(part, Channels)]))


def _aligned(inputs: Sequence[Value], groups: ChannelGroups) -> tuple[Channels, Channels]:
    """The two inputs, of which each channel meets the one at its place."""
    a, b = inputs
    if isinstance(a, Unknown) or isinstance(b, Unknown):
        raise UnknownEffectError("a sum or product with a tensor whose channels are not known")
    if (len(a), a.axis, a.flattened) != (len(b), b.axis, b.flattened):
        raise UnknownEffectError("a sum or product of tensors with different channels")
    groups.join_(a.groups, b.groups)
    return a, b
