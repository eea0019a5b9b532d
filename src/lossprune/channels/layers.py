"""How channels pass through layers with parameters: linear, convolution and batch norm.

Index letters: o output, i input, t kernel position (tap). A linear layer has one tap.

A channel that holds the constant c adds Σ_t c · w[o,i,t] to output o: a number, which goes into the
bias. Where a convolution pads with zeros, the taps that reach into the padding do so at some
positions only; those are its *border* taps, and what they add is no number. A tap at distance
d = t · dilation from the first never reaches outside, whatever the size of the input, if

    left padding ≤ d ≤ dilation · (size − 1) − right padding.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lossprune.channels.nodes import BatchNorm, Convolution, paddings, scale_and_shift
from lossprune.channels.operations import Operation, UnknownEffectError, only
from lossprune.channels.values import ChannelGroups, Channels, Unknown, Value


@dataclass(frozen=True)
class WeightedOperation(Operation):
    """A linear layer or a convolution.

    Attributes:
        name: of the module.
        weight: (o, i, t) float, 0 where removed; i = 1 in a :class:`Depthwise` one.
        kept: (o, i, t) bool.
        bias: (o,) float64; zeros where the layer has none.
        border: (t,) bool, the taps that reach into zero padding at some positions.
        axis: of the channels, in input and output.
    """

    name: str
    weight: Tensor
    kept: Tensor
    bias: Tensor
    border: Tensor
    axis: int


class Connected(WeightedOperation):
    """A layer of all input channels with all outputs."""

    def entering(self, inputs: Sequence[Value]) -> Channels:
        """Return what is known of the input's channels; all are live where nothing is."""
        (value,) = inputs
        count = self.weight.shape[1]
        if isinstance(value, Unknown):
            ones = torch.ones(count, dtype=torch.bool)
            none = torch.full((count,), math.nan, dtype=torch.float64)
            return Channels(torch.full((count,), -1), ones, none, self.axis)
        return _unfolded(value, count, {self.axis}, "a layer")

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        entering = self.entering(inputs)
        connected = self.kept.any(2)
        live = (connected & entering.live).any(1)
        varies = (connected & entering.constant.isnan()).any(1)
        bordered = self.edges(entering).any(2).any(1)
        constant = torch.where(varies | bordered, math.nan, self.bias + self.folded(entering))
        return Channels(groups.fresh(len(self.bias)), live, constant, self.axis)

    def backward(self, useful: Tensor, inputs: Sequence[Value]) -> list[Tensor]:
        (value,) = inputs
        if isinstance(value, Unknown):
            return [torch.zeros(0, dtype=torch.bool)]
        reads = self.reads(useful)
        return [value.folded(reads) if value.flattened else reads]

    def reads(self, useful: Tensor) -> Tensor:
        """Return the inputs (i,) that the ``useful`` outputs (o,) are connected with."""
        return self.kept[useful].any(2).any(0)

    def edges(self, entering: Channels) -> Tensor:
        """Return the kept border taps (o, i, t) of inputs with a constant other than 0."""
        return self.kept & constants(entering)[:, None] & self.border

    def folded(self, entering: Channels) -> Tensor:
        """Return what constant inputs add to each output at every position, (o,)."""
        chosen = constants(entering)
        weight = self.weight[:, chosen].double() * ~self.border
        return torch.einsum("oit,i->o", weight, entering.constant[chosen])


class Depthwise(WeightedOperation):
    """A convolution of each channel by itself."""

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        channels = _unfolded(only(inputs), len(self.bias), {self.axis}, "a layer")
        connected = self.kept.any(2)[:, 0]
        sums = self.weight.double().sum(2)[:, 0]
        bordered = (self.kept & self.border).any(2)[:, 0] & constants(channels)
        constant = torch.where(bordered, math.nan, channels.constant * sums)
        constant = torch.where(connected, constant, 0.0) + self.bias
        return Channels(channels.groups, channels.live & connected, constant, self.axis)

    def backward(self, useful: Tensor, inputs: Sequence[Value]) -> list[Tensor]:
        return [useful & self.kept.any(2)[:, 0]]


@dataclass(frozen=True)
class Normalised(Operation):
    """Batch norm by running statistics: c ↦ scale · c + shift, channel by channel."""

    name: str
    scale: Tensor
    shift: Tensor
    axis: frozenset[int]

    def forward(self, inputs: Sequence[Value], groups: ChannelGroups) -> Value:
        channels = _unfolded(only(inputs), len(self.scale), self.axis, "a batch norm")
        return channels.mapped(channels.constant * self.scale + self.shift)

    def backward(self, useful: Tensor, inputs: Sequence[Value]) -> list[Tensor]:
        channels = only(inputs)
        return [channels.folded(useful) if channels.flattened else useful]


def _unfolded(value: Channels, features: int, axes: Collection[int], reader: str) -> Channels:
    """Return the channels as ``reader`` reads them, along one of these dimensions."""
    channels = value.unfolded(features)
    if channels is None or channels.axis not in axes:
        raise UnknownEffectError(f"{reader} over another dimension than the channels before it")
    return channels


def constants(channels: Channels) -> Tensor:
    """Return which channels hold a constant other than 0."""
    return ~channels.constant.isnan() & (channels.constant != 0)


def layer_operation(
    name: str, layer: nn.Linear | Convolution, kept: Tensor
) -> WeightedOperation | None:
    """Return the operation of ``layer``, whose weights are zero where not ``kept``.

    None: it is a grouped convolution, which is neither of the two.
    """
    weight = layer.weight.detach().cpu()
    taps = math.prod(weight.shape[2:])
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if layer.bias is not None:
        bias = layer.bias.detach().cpu().double()
    border, groups = torch.zeros(1, dtype=torch.bool), 1
    if not isinstance(layer, nn.Linear):
        border, groups = _border(layer), layer.groups
    if groups == 1:
        kind = Connected
    elif groups == layer.weight.shape[0] == layer.in_channels:
        kind = Depthwise
    else:
        return None
    shape = (*weight.shape[:2], taps)
    axis = 1 - weight.dim()
    return kind(name, weight.reshape(shape), kept.cpu().reshape(shape), bias, border, axis)


def norm_operation(name: str, norm: BatchNorm) -> Normalised | None:
    """Return the operation of ``norm``; None if it keeps no running statistics."""
    found = scale_and_shift(norm)
    if found is None:
        return None
    axes = {nn.BatchNorm1d: {-1, -2}, nn.BatchNorm2d: {-3}, nn.BatchNorm3d: {-4}}[type(norm)]
    return Normalised(name, found[0].cpu(), found[1].cpu(), frozenset(axes))


def _border(layer: Convolution) -> Tensor:
    """Which taps reach into zero padding at some positions, in the order of the flat kernel."""
    size = layer.kernel_size
    inside = torch.ones(size, dtype=torch.bool)
    along = zip(size, layer.dilation, paddings(layer), strict=True)
    for dimension, (length, dilation, (left, right)) in enumerate(along):
        reach = dilation * (length - 1)
        distance = torch.arange(length) * dilation
        safe = (distance >= left) & (distance <= reach - right)
        inside &= safe.reshape([-1 if d == dimension else 1 for d in range(len(size))])
    if layer.padding_mode != "zeros":
        return torch.zeros(inside.numel(), dtype=torch.bool)
    return ~inside.flatten()
