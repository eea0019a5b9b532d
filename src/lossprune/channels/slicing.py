"""Layers sliced, in place, to the channels that stay."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lossprune.channels.analysis import Analysis
from lossprune.channels.kept import carrier, layer_slices
from lossprune.channels.layers import Connected, Depthwise, Normalised
from lossprune.channels.nodes import BatchNorm
from lossprune.channels.values import Channels


@dataclass(frozen=True)
class SlicedWeight:
    """A layer's new weight (o, i, t), where it may differ from 0, and its new bias (o,)."""

    weight: Tensor
    kept: Tensor
    bias: Tensor


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
        place = carrier(entering, columns, bordering)
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
