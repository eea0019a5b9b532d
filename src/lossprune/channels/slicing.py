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
from lossprune.channels.layers import Connected, Normalised, WeightedOperation, constants
from lossprune.channels.nodes import BatchNorm
from lossprune.channels.values import Channels

# A carrier below this part of the largest constant that it stands for would magnify its rounding.
_SMALLEST_CARRIER = 0.1


@dataclass(frozen=True)
class LayerSlice:
    """What stays of a layer: bool (o,) of its channels, and (i,) of those it reads where it does.

    ``columns`` is None for a layer that works on each channel by itself.
    """

    node: fx.Node
    operation: WeightedOperation | Normalised
    rows: Tensor
    columns: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether all of the layer stays."""
        return bool(self.rows.all()) and (self.columns is None or bool(self.columns.all()))


def layer_slices(analysis: Analysis) -> Iterator[LayerSlice]:
    """Return what stays of every known layer."""
    kept = _KeptChannels(analysis)
    for node, operation in analysis.operations.items():
        if not isinstance(operation, WeightedOperation | Normalised):
            continue
        columns = None
        if isinstance(operation, Connected):
            columns = kept.of(operation.entering(analysis.inputs(node)))
        yield LayerSlice(node, operation, kept.of(analysis.channels(node)), columns)


class _KeptChannels:
    """Which channels are kept, by group."""

    def __init__(self, analysis: Analysis) -> None:
        self._group = analysis.groups.representatives()
        self._kept = torch.zeros(len(self._group), dtype=torch.bool)
        for node, _ in analysis.required:
            value = analysis.values[node]
            if isinstance(value, Channels):
                self._keep_(value.groups)
        connected = [
            (node, operation, entering)
            for node, operation in analysis.operations.items()
            if isinstance(operation, Connected)
            and (entering := operation.entering(analysis.inputs(node))).groups.ge(0).all()
        ]
        for node, operation, entering in connected:
            read = operation.reads(analysis.useful[node]) & entering.constant.isnan()
            self._keep_(entering.groups[read])
        for node, operation in analysis.operations.items():
            if isinstance(operation, WeightedOperation | Normalised):
                channels = analysis.channels(node)
                if not self.of(channels).any():  # a layer without any channel cannot be had
                    self._keep_(channels.groups[:1])
        for node, operation, entering in connected:
            bordering = operation.edges(entering)[analysis.useful[node]].any(2).any(0)
            if bordering.any() and _carrier(entering, self.of(entering), bordering) is None:
                largest = torch.where(bordering, entering.constant.abs(), -1).argmax()
                self._keep_(entering.groups[largest : largest + 1])

    def of(self, channels: Channels) -> Tensor:
        """Return which of these channels are kept, bool (channels,): all that are in no group."""
        return self._kept[self._group[channels.groups]] | (channels.groups < 0)

    def _keep_(self, groups: Tensor) -> None:
        self._kept[self._group[groups]] = True


def _carrier(entering: Channels, kept: Tensor, bordering: Tensor) -> int | None:
    """Return the channel among those ``kept`` that stands for the ``bordering`` constants."""
    size = torch.where(kept & constants(entering), entering.constant.abs(), 0.0)
    if not len(size) or not bordering.any():
        return None
    largest = entering.constant[bordering].abs().max()
    return int(size.argmax()) if size.max() >= _SMALLEST_CARRIER * largest else None


def slice_(model: nn.Module, analysis: Analysis) -> dict[str, Tensor]:
    """Slice every known layer of ``model``; return what is kept of their weights, by name."""
    masks = {}
    for part in layer_slices(analysis):
        operation, rows = part.operation, part.rows
        layer = model.get_submodule(operation.name)
        if isinstance(operation, Normalised):
            assert isinstance(layer, BatchNorm)
            slice_norm_(layer, rows)
            continue
        constant = analysis.channels(part.node).constant
        # The other rows hold a constant, or serve nothing.
        working = analysis.useful[part.node] & constant.isnan()
        columns = slice(None) if part.columns is None else part.columns
        if isinstance(operation, Connected):
            assert part.columns is not None
            entering = operation.entering(analysis.inputs(part.node))
            weight, kept = _connected(operation, entering, working, part.columns)
            bias = operation.bias + operation.folded(entering)
        else:
            kept = operation.kept & working[:, None, None]
            weight, bias = torch.where(kept, operation.weight, 0), operation.bias
        bias = torch.where(working, bias, constant)
        bias = torch.where(bias.isnan(), 0.0, bias)
        replace_(layer, weight[rows][:, columns], bias[rows])
        shape = layer.get_parameter("weight").shape
        masks[f"{operation.name}.weight"] = kept[rows][:, columns].reshape(shape)
    return masks


def _connected(
    layer: Connected, entering: Channels, working: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weights (o, i, t) of the ``working`` rows, and where they may differ from 0."""
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
    return weight, kept


@torch.no_grad()
def replace_(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give a linear or convolution layer this weight (o, i, t) and this bias (o,), and its size.

    A layer without a bias gets one only where it is not 0.
    """
    old = layer.weight
    assert isinstance(old, Tensor)
    shape = (*weight.shape[:2], *old.shape[2:])
    layer.weight = _parameter(weight.reshape(shape), old)
    if layer.bias is not None or bias.any():
        layer.bias = _parameter(bias, layer.bias if isinstance(layer.bias, Tensor) else old)
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
