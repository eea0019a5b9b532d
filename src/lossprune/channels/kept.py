"""Which channels the compacted network keeps, and so what it keeps of each layer.

Needed are the channels that a useful output of some layer reads, unless their constant goes into
that layer's bias; and all those that leave the network or enter an operation that is not known.
Channels of one group, such as those of a residual sum, stay or go together.

What constant channels add through a convolution's border taps is no number, but it is the same as
one constant channel can add: Σ_i c_i w[o,i,t] = c_r · Σ_i (c_i / c_r) w[o,i,t].  So one such
channel r, the *carrier*, stands for all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lossprune.channels.analysis import Analysis
from lossprune.channels.layers import Connected, Depthwise, Normalised, constants
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
        connected = [(n, o, e) for n, o, e in _connected(analysis) if (e.groups >= 0).all()]
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
            if bordering.any() and carrier(entering, self.of(entering), bordering) is None:
                largest = torch.where(bordering, entering.constant.abs(), -1).argmax()
                self._keep_(entering.groups[largest : largest + 1])

    def of(self, channels: Channels) -> Tensor:
        """Return which of these channels are kept, bool (channels,)."""
        return self._kept[self._group[channels.groups]]

    def _keep_(self, groups: Tensor) -> None:
        self._kept[self._group[groups]] = True


def carrier(entering: Channels, kept: Tensor, bordering: Tensor) -> int | None:
    """Return the channel among those ``kept`` that stands for the ``bordering`` constants."""
    size = torch.where(kept & constants(entering), entering.constant.abs(), 0.0)
    if not len(size) or not bordering.any():
        return None
    largest = entering.constant[bordering].abs().max()
    return int(size.argmax()) if size.max() >= _SMALLEST_CARRIER * largest else None


def _connected(analysis: Analysis) -> Iterator[tuple[fx.Node, Connected, Channels]]:
    for node, operation in analysis.operations.items():
        if isinstance(operation, Connected):
            yield node, operation, operation.entering(analysis.inputs(node))
