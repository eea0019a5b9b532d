"""Which channels the compacted network keeps, and its layers, in place, sliced to those.

Needed are the channels that a useful output of some layer reads, unless their constant goes into
that layer's bias; and all those that leave the network or enter an operation that is not known.
Channels of one group, such as those of a residual sum, stay or go together.

What constant channels add through a convolution's border taps is no number, but it is the same as
one constant channel can add: Σ_i c_i w[o,i,t] = c_r · Σ_i (c_i / c_r) w[o,i,t].  So one such
channel r, the *carrier*, stands for all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lossprune.channels.analysis import Analysis
from lossprune.channels.layers import Connected, Depthwise, Normalised, constants
from lossprune.channels.nodes import BatchNorm
from lossprune.channels.values import Channels, Unknown

# A carrier below this part of the largest constant that it stands for would magnify its rounding.
_SMALLEST_CARRIER = 0.1


@dataclass(frozen=True)
class LayerSlice:
    """What stays of a layer: bool (o,) of its channels, and (i,) of those it reads where it does.

    ``columns`` is None for a layer that works on each channel by itself.
    """

    node: fx.Node
    operation: Connected | Depthwise | Normalised
    rows: Tensor
    columns: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether all of the layer stays."""
        return bool(self.rows.all()) and (self.columns is None or bool(self.columns.all()))


@dataclass(frozen=True)
class SlicedWeight:
    """A layer's new weight (o, i, t), where it may differ from 0, and its new bias (o,)."""

    weight: Tensor
    kept: Tensor
    bias: Tensor


def layer_slices(analysis: Analysis) -> Iterator[LayerSlice]:
    """Return what stays of every known layer."""
    kept = _KeptChannels(analysis)
    for node, operation in analysis.operations.items():
        value = analysis.values[node]
        if not isinstance(operation, Connected | Depthwise | Normalised):
            continue
        if not isinstance(value, Channels):
            continue
        columns = None
        if isinstance(operation, Connected):
            inputs = analysis.inputs(node)
            columns = torch.ones(operation.weight.shape[1], dtype=torch.bool)
            if not isinstance(inputs[0], Unknown):
                columns = kept.of(operation.entering(inputs))
        yield LayerSlice(node, operation, kept.of(value), columns)


class _KeptChannels:
    """Which channels are kept, by group."""

    def __init__(self, analysis: Analysis) -> None:
        self._group = analysis.groups.representatives()
        self._kept = torch.zeros(len(self._group), dtype=torch.bool)
        for node, _ in analysis.required:
            value = analysis.values[node]
            if isinstance(value, Channels):
                self._keep_(value.groups)
        connected = [(n, o, e) for n, o, e in _connected_layers(analysis) if (e.groups >= 0).all()]
        for node, operation, entering in connected:
            read = operation.reads(analysis.useful[node]) & entering.constant.isnan()
            self._keep_(entering.groups[read])
        for node, operation in analysis.operations.items():
            value = analysis.values[node]
            if isinstance(operation, Connected | Depthwise | Normalised):
                assert isinstance(value, Channels)
                if not self.of(value).any():  # a layer without any channel cannot be had
                    self._keep_(value.groups[:1])
        for node, operation, entering in connected:
            bordering = operation.edges(entering)[analysis.useful[node]].any(2).any(0)
            if bordering.any() and _carrier(entering, self.of(entering), bordering) is None:
                largest = torch.where(bordering, entering.constant.abs(), -1).argmax()
                self._keep_(entering.groups[largest : largest + 1])

    def of(self, channels: Channels) -> Tensor:
        """Return which of these channels are kept, bool (channels,)."""
        return self._kept[self._group[channels.groups]]

    def _keep_(self, groups: Tensor) -> None:
        self._kept[self._group[groups]] = True


def _carrier(entering: Channels, kept: Tensor, bordering: Tensor) -> int | None:
    """Return the channel among those ``kept`` that stands for the ``bordering`` constants."""
    size = torch.where(kept & constants(entering), entering.constant.abs(), 0.0)
    if not len(size) or not bordering.any():
        return None
    largest = entering.constant[bordering].abs().max()
    return int(size.argmax()) if size.max() >= _SMALLEST_CARRIER * largest else None


def _connected_layers(analysis: Analysis) -> Iterator[tuple[fx.Node, Connected, Channels]]:
    for node, operation in analysis.operations.items():
        if isinstance(operation, Connected):
            yield node, operation, operation.entering(analysis.inputs(node))


def slice_(model: nn.Module, analysis: Analysis) -> dict[str, Tensor]:
    """Slice every known layer of ``model``; return what is kept of their weights, by name."""
    masks = {}
    for part in layer_slices(analysis):
        node, operation, rows = part.node, part.operation, part.rows
        layer = model.get_submodule(operation.name)
        if isinstance(operation, Normalised):
            assert isinstance(layer, BatchNorm)
            slice_norm_(layer, rows)
            continue
        value, useful = analysis.values[node], analysis.useful[node]
        assert isinstance(value, Channels)
        if isinstance(operation, Connected):
            assert part.columns is not None
            entering = operation.entering(analysis.inputs(node))
            sliced = _connected(operation, entering, value, useful, rows, part.columns)
        else:
            sliced = _depthwise(operation, value, useful, rows)
        replace_(layer, sliced.weight, sliced.bias)
        weight = layer.get_parameter("weight")
        masks[f"{operation.name}.weight"] = sliced.kept.reshape(weight.shape)
    return masks


def _connected(
    layer: Connected,
    entering: Channels,
    value: Channels,
    useful: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> SlicedWeight:
    working = useful & value.constant.isnan()  # the other rows hold a constant, or serve nothing
    kept = layer.kept & working[:, None, None] & entering.constant.isnan()[:, None]
    weight = torch.where(kept, layer.weight, 0)
    edges = layer.edges(entering) & working[:, None, None]
    bordering = edges.any(2).any(0)
    if bordering.any():
        place = _carrier(entering, columns, bordering)
        assert place is not None
        ratio = entering.constant[bordering] / entering.constant[place]
        through = torch.where(edges, layer.weight, 0)[:, bordering].double()
        weight[:, place] = torch.einsum("oit,i->ot", through, ratio).to(weight.dtype)
        kept[:, place] = edges.any(1)
    bias = torch.where(working, layer.bias + layer.folded(entering), value.constant)
    bias = torch.where(bias.isnan(), 0.0, bias)
    return SlicedWeight(weight[rows][:, columns], kept[rows][:, columns], bias[rows])


def _depthwise(layer: Depthwise, value: Channels, useful: Tensor, rows: Tensor) -> SlicedWeight:
    working = useful & value.constant.isnan()
    kept = layer.kept & working[:, None, None]
    bias = torch.where(working, layer.bias, value.constant)
    bias = torch.where(bias.isnan(), 0.0, bias)
    return SlicedWeight(torch.where(kept, layer.weight, 0)[rows], kept[rows], bias[rows])


@torch.no_grad()
def replace_(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give a linear or convolution layer this weight (o, i, t) and this bias (o,), and its size.

    A layer without a bias gets one only where it is not 0.
    """
    old = layer.weight
    assert isinstance(old, Tensor)
    shape = (*weight.shape[:2], *old.shape[2:])
    layer.weight = _parameter(weight.reshape(shape), old)
    if layer.bias is not None:
        assert isinstance(layer.bias, Tensor)
        layer.bias = _parameter(bias, layer.bias)
    elif bias.any():
        layer.bias = _parameter(bias, old)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape[:2]
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer.groups = 1 if layer.groups == 1 else shape[0]
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups


@torch.no_grad()
def slice_norm_(norm: BatchNorm, stay: Tensor) -> None:
    """Leave a batch norm these of its channels, bool (c,)."""
    for name, parameter in list(norm._parameters.items()):
        if parameter is not None:
            setattr(norm, name, _parameter(parameter[stay.to(parameter.device)], parameter))
    for name, buffer in list(norm._buffers.items()):
        if buffer is not None and buffer.dim():
            setattr(norm, name, buffer[stay.to(buffer.device)].clone())
    norm.num_features = int(stay.sum())


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    values = values.to(like.device, like.dtype).contiguous()
    assert math.prod(values.shape), "a layer keeps at least one channel"
    return nn.Parameter(values, requires_grad=like.requires_grad)
