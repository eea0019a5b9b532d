"""Layers cut down, in place, to the channels that stay."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lossprune.deployment.analysis import Analysis
from lossprune.deployment.channels import Channels, Unknown
from lossprune.deployment.layers import BatchNorm, Connected, Depthwise, Normalised
from lossprune.deployment.presence import Presence, carrier


@dataclass(frozen=True)
class Cut:
    """A layer's new weight (o, i, t), where it may differ from 0, and its new bias (o,)."""

    weight: Tensor
    kept: Tensor
    bias: Tensor


def cut_(model: nn.Module, analysis: Analysis) -> dict[str, Tensor]:
    """Cut every known layer of ``model`` down; return what is kept of their weights, by name."""
    presence = Presence(analysis)
    masks = {}
    for node, operation in analysis.operations.items():
        inputs, value = analysis.inputs(node), analysis.values[node]
        if not isinstance(value, Channels):
            continue
        stay = presence.of(value)
        if isinstance(operation, Normalised):
            norm = model.get_submodule(operation.name)
            assert isinstance(norm, BatchNorm)
            _cut_norm_(norm, stay)
            continue
        if isinstance(operation, Connected):
            columns = torch.ones(operation.weight.shape[1], dtype=torch.bool)
            entering = operation.entering(inputs)
            if not isinstance(inputs[0], Unknown):
                columns = presence.of(entering)
            cut = _cut_connected(operation, entering, value, analysis.useful[node], stay, columns)
        elif isinstance(operation, Depthwise):
            cut = _cut_depthwise(operation, value, analysis.useful[node], stay)
        else:
            continue
        layer = model.get_submodule(operation.name)
        _replace_(layer, cut)
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
def _replace_(layer: nn.Module, cut: Cut) -> None:
    old = layer.weight
    assert isinstance(old, Tensor)
    shape = (*cut.weight.shape[:2], *old.shape[2:])
    layer.weight = _parameter(cut.weight.reshape(shape), old)
    if layer.bias is not None:
        assert isinstance(layer.bias, Tensor)
        layer.bias = _parameter(cut.bias, layer.bias)
    elif cut.bias.any():
        layer.bias = _parameter(cut.bias, old)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape[:2]
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer.groups = 1 if layer.groups == 1 else shape[0]
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups


@torch.no_grad()
def _cut_norm_(norm: BatchNorm, stay: Tensor) -> None:
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
