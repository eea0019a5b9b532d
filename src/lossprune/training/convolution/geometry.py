"""Which inputs a convolution's outputs read, and which outputs the gradient of its inputs reads.

Both are the same kind of sum.  Along an axis an output i of a convolution with stride s, padding p
and dilation d reads the inputs i s + t d − p of its taps t.  The gradient of the input j is a sum
over the outputs (j + p − t d) / s of the taps for which that is whole: for each remainder of j by s
a sum with stride 1.  Positions at the rim reach fewer taps than those inside.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, product

Pair = tuple[int, int]


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution.

    Attributes:
        inputs, outputs: positions.
        taps: of the kernel.
    """

    inputs: int
    outputs: int
    taps: int
    stride: int
    padding: int
    dilation: int


@dataclass(frozen=True)
class Segment:
    """Positions of an axis which the same taps reach: origin + step i, i < count.

    Attributes:
        stride: the position i reads, by the tap t, at taps[t] + stride i.
        taps: where the taps read for i = 0.
    """

    origin: int
    step: int
    count: int
    stride: int
    taps: Mapping[int, int]

    @property
    def start(self) -> int:
        """The first position that is read for i = 0."""
        return min(self.taps.values(), default=0)

    @property
    def reach(self) -> int:
        """How many positions, from the first to the last, are read for one i."""
        return max(self.taps.values(), default=0) - self.start + 1


@dataclass(frozen=True)
class Window:
    """Positions of a map which the same taps reach."""

    y: Segment
    x: Segment

    @property
    def taps(self) -> Iterator[tuple[Pair, Pair]]:
        """Taps, with the row and the column that they read for the first position."""
        for (ky, row), (kx, column) in product(self.y.taps.items(), self.x.taps.items()):
            yield (ky, kx), (row, column)


def output_segments(axis: Axis, *, apart: bool) -> list[Segment]:
    """How the outputs read the inputs; the rim ``apart``, or read as zeros beyond the map.

    >>> same = Axis(inputs=4, outputs=4, taps=3, stride=1, padding=1, dilation=1)
    >>> [(part.origin, part.count, part.taps) for part in output_segments(same, apart=True)]
    [(0, 1, {1: 0, 2: 1}), (1, 2, {0: 0, 1: 1, 2: 2}), (3, 1, {0: 2, 1: 3})]
    """
    read = {t: t * axis.dilation - axis.padding for t in range(axis.taps)}
    return list(_segments(axis.outputs, axis.inputs, axis.stride, read, 0, 1, apart=apart))


def input_segments(axis: Axis, *, apart: bool) -> list[Segment]:
    """How the gradient of the inputs reads that of the outputs.

    >>> halved = Axis(inputs=4, outputs=2, taps=1, stride=2, padding=0, dilation=1)
    >>> [(part.origin, part.step, part.taps) for part in input_segments(halved, apart=False)]
    [(0, 2, {0: 0}), (1, 2, {})]
    """
    found: list[Segment] = []
    for remainder in range(min(axis.stride, axis.inputs)):
        places = {t: remainder + axis.padding - t * axis.dilation for t in range(axis.taps)}
        read = {t: at // axis.stride for t, at in places.items() if at % axis.stride == 0}
        count = len(range(remainder, axis.inputs, axis.stride))
        found += _segments(count, axis.outputs, 1, read, remainder, axis.stride, apart=apart)
    return found


def _segments(
    count: int,
    size: int,
    stride: int,
    read: Mapping[int, int],
    origin: int,
    step: int,
    *,
    apart: bool,
) -> Iterator[Segment]:
    """Positions i < count, which read at read[t] + stride i of ``size`` positions."""

    def reached(i: int) -> tuple[int, ...]:
        return tuple(t for t, at in read.items() if 0 <= at + stride * i < size)

    groups = [list(range(count))]
    if apart:
        groups = [list(same) for _, same in groupby(range(count), key=reached)]
    for positions in groups:
        first = positions[0]
        taps = sorted({t for i in positions for t in reached(i)})
        moved = {t: read[t] + stride * first for t in taps}
        yield Segment(origin + step * first, step, len(positions), stride, moved)


def windows(y: list[Segment], x: list[Segment]) -> list[Window]:
    """All pairs of segments."""
    return [Window(*pair) for pair in product(y, x)]


def work(found: list[Window]) -> int:
    """Multiplications for each pair of channels, of zeros beyond the map too."""
    return sum(w.y.count * w.x.count * len(w.y.taps) * len(w.x.taps) for w in found)
