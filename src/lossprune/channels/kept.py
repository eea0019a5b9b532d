"""Which channels the compacted network keeps.

Needed are the channels that a useful output of some layer reads, unless their constant goes into
that layer's bias; and all those that leave the network or enter an operation that is not known.
Channels that share an identity, such as those of a residual sum, stay or go together.

What constant channels add through a convolution's border taps is no number, but it is the same as
one constant channel can add: Σ_i c_i w[o,i,t] = c_r · Σ_i (c_i / c_r) w[o,i,t].  So one such
channel r, the *carrier*, stands for all.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from lossprune.channels.analysis import Analysis
from lossprune.channels.layers import Connected, Depthwise, Normalised, constants
from lossprune.channels.values import Channels

# A carrier below this part of the largest constant that it stands for would magnify its rounding.
_SMALLEST_CARRIER = 0.1


class Presence:
    """Which channels are kept, by identity."""

    def __init__(self, analysis: Analysis) -> None:
        self._roots = analysis.identities.roots()
        self._kept = torch.zeros(len(self._roots), dtype=torch.bool)
        for node, _ in analysis.held:
            value = analysis.values[node]
            if isinstance(value, Channels):
                self._keep_(value.ids)
        connected = [(n, o, e) for n, o, e in _connected(analysis) if (e.ids >= 0).all()]
        for node, operation, entering in connected:
            read = operation.reads(analysis.useful[node]) & entering.constant.isnan()
            self._keep_(entering.ids[read])
        for node, operation in analysis.operations.items():
            value = analysis.values[node]
            if isinstance(operation, Connected | Depthwise | Normalised):
                assert isinstance(value, Channels)
                if not self.of(value).any():  # a layer without any channel cannot be had
                    self._keep_(value.ids[:1])
        for node, operation, entering in connected:
            bordering = operation.edges(entering)[analysis.useful[node]].any(2).any(0)
            if bordering.any() and carrier(entering, self.of(entering), bordering) is None:
                largest = torch.where(bordering, entering.constant.abs(), -1).argmax()
                self._keep_(entering.ids[largest : largest + 1])

    def of(self, channels: Channels) -> Tensor:
        """Return which of these channels are kept, bool (channels,)."""
        return self._kept[self._roots[channels.ids]]

    def _keep_(self, ids: Tensor) -> None:
        self._kept[self._roots[ids]] = True


def carrier(entering: Channels, present: Tensor, bordering: Tensor) -> int | None:
    """Return the channel among those ``present`` that stands for the ``bordering`` constants."""
    size = torch.where(present & constants(entering), entering.constant.abs(), 0.0)
    if not len(size) or not bordering.any():
        return None
    largest = entering.constant[bordering].abs().max()
    return int(size.argmax()) if size.max() >= _SMALLEST_CARRIER * largest else None


def _connected(analysis: Analysis) -> Iterator[tuple[fx.Node, Connected, Channels]]:
    for node, operation in analysis.operations.items():
        if isinstance(operation, Connected):
            yield node, operation, operation.entering(analysis.inputs(node))
