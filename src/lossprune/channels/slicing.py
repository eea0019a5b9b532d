"""Layers cut down, in place, to the channels that stay."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lossprune.channels.analysis import Analysis
from lossprune.channels.kept import Presence, carrier
from lossprune.channels.layers import Connected, Depthwise, Normalised
from lossprune.channels.nodes import BatchNorm
from lossprune.channels.values import Channels, Unknown


@dataclass(frozen=True)
class Cut:
    """A layer's new weight (o, i, t), where it may differ from 0, and its new bias (o,)."""

    weight: Tensor
    kept: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Extent:
    """What stays of a layer: bool (o,) of its channels, and (i,) of those it reads where it does.

    ``columns`` is None for a layer that works on each channel by itself.
    """

    node: fx.Node
    operation: Connected | Depthwise | Normalised
    rows: Tensor
    columns: Tensor | None


def extents(analysis: Analysis) -> Iterator[Extent]:
    """Return what stays of every known layer."""
    presence = Presence(analysis)
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
                columns = presence.of(operation.entering(inputs))
        yield Extent(node, operation, presence.of(value), columns)


def cut_(model: nn.Module, analysis: Analysis) -> dict[str, Tensor]:
    """Cut every known layer of ``model`` down; return what is kept of their weights, by name."""
    masks = {}
    for extent in extents(analysis):
        node, operation, rows = extent.node, extent.operation, extent.rows
        layer = model.get_submodule(operation.name)
        if isinstance(operation, Normalised):
            assert isinstance(layer, BatchNorm)
            cut_norm_(layer, rows)
            continue
        value, useful = analysis.values[node], analysis.useful[node]
        assert isinstance(value, Channels)
        if isinstance(operation, Connected):
            assert extent.columns is not None
            entering = operation.entering(analysis.inputs(node))
            cut = _cut_connected(operation, entering, value, useful, rows, extent.columns)
        else:
            cut = _cut_depthwise(operation, value, useful, rows)
        replace_(layer, cut.weight, cut.bias)
        weight = layer.get_parameter("weight")
        masks[f"{operation.name}.weight"] = cut.kept.reshape(weight.shape)
    return masks


def _cut_connected(
    layer: Connected,
    entering: Channels,
    value: Channels,
    useful: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Cut:
    working = useful & value.constant.isnan()  # the other rows hold a constant, or serve nothing
    kept = layer.kept & working[:, None, None] & entering.constant.isnan()[:, None]
    weight = torch.where(kept, layer.weight, 0)
    edges = layer.edges(entering) & working[:, None, None]
    bordering = edges.any(2).any(0)
    if bordering.any():
        place = carrier(entering, columns, bordering)
        assert place is not None
        ratio = entering.constant[bordering] / entering.constant[place]
        through = torch.where(edges, layer.weight, 0)[:, bordering].double()
        weight[:, place] = torch.einsum("oit,i->ot", through, ratio).to(weight.dtype)
        kept[:, place] = edges.any(1)
    bias = torch.where(working, layer.bias + layer.folded(entering), value.constant)
    bias = torch.where(bias.isnan(), 0.0, bias)
    return Cut(weight[rows][:, columns], kept[rows][:, columns], bias[rows])


def _cut_depthwise(layer: Depthwise, value: Channels, useful: Tensor, rows: Tensor) -> Cut:
    working = useful & value.constant.isnan()
    kept = layer.kept & working[:, None, None]
    bias = torch.where(working, layer.bias, value.constant)
    bias = torch.where(bias.isnan(), 0.0, bias)
    return Cut(torch.where(kept, layer.weight, 0)[rows], kept[rows], bias[rows])


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
def cut_norm_(norm: BatchNorm, stay: Tensor) -> None:
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
