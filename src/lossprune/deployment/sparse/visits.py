"""The order in which the kept weights of a convolution are gone through.

A tile of positions reads a small part of every input channel, and reads it once for every output
channel.  Where these parts are more than a near cache holds, the input channels are taken in
chunks, and all output channels go by one chunk before the next: a visit is the kept weights of one
output channel in one chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NEAR = 42_000  # bytes of a map that stay in a near cache beside the sums
_MISS = 0.8  # cycles more for a vector from the next cache, where nearly all are from there
_VISIT = 10.0, 2.5  # cycles of a visit, and for each of its sums, fetched and put back


@dataclass(frozen=True)
class Visits:
    """Kept weights in the order in which they are gone through; all int64.

    Attributes:
        total: (outputs + 1), kept weights of the output channels before.
        visit: (chunks, outputs), the output channels of a chunk, those with most kept weights
            first.
        begin: (chunks · outputs + 1), where a visit's kept weights begin in ``order``.
        order: (kept), the kept weights as they are gone through.
    """

    total: Tensor
    visit: Tensor
    begin: Tensor
    order: Tensor


def chunks_of(channels: int, size: int, kept: float, positions: int) -> int:
    """Return in how many chunks of the input channels the kept weights cost the fewest cycles.

    With q chunks an output channel costs q · v + K · t · m · (1 − N q / B)² cycles beside the
    multiply-adds: v for a visit, m for a vector from a farther cache, for K kept weights, t vectors
    each, of B bytes that a tile reads, N of which stay in the near cache.  The square is a fit: of
    what is little more than N bytes little is missed, and that is found not far away.

    Args:
        channels: how many they are.
        size: bytes of each that a tile reads.
        kept: weights of an output channel, on average.
        positions: of a tile.

    >>> chunks_of(256, size=2304, kept=240.0, positions=16)
    12
    >>> chunks_of(256, size=2304, kept=20.0, positions=16)
    1
    """
    begun, each = _VISIT

    def cycles(chunks: int) -> float:
        far = max(0.0, 1 - _NEAR * chunks / (channels * size))
        return chunks * (begun + each * positions) + kept * positions * _MISS * far**2

    return min(range(1, channels * size // _NEAR + 2), key=cycles)


def visits(output: Tensor, channel: Tensor, outputs: int, channels: int, chunks: int) -> Visits:
    """Return the visits of kept weights, of these output and input channels each.

    With one chunk the output channels are visited as they are numbered.

    >>> found = visits(torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2]), 2, 4, chunks=2)
    >>> found.visit.tolist(), found.begin.tolist(), found.order.tolist()
    ([[1, 0], [0, 1]], [0, 1, 1, 2, 3], [1, 0, 2])
    """
    chunk = channel // -(-channels // chunks)
    counts = torch.bincount(chunk * outputs + output, minlength=chunks * outputs)
    counts = counts.view(chunks, outputs)
    # Visits of equal length follow one another, so that a processor foresees where each ends.
    visit = (-counts).argsort(dim=1, stable=True) if chunks > 1 else torch.arange(outputs)[None]
    rank = visit.argsort(dim=1)
    zero = counts.new_zeros(1)
    return Visits(
        total=torch.cat([zero, counts.sum(0).cumsum(0)]),
        visit=visit,
        begin=torch.cat([zero, counts.gather(1, visit).flatten().cumsum(0)]),
        order=(chunk * outputs + rank[chunk, output]).argsort(stable=True),
    )
