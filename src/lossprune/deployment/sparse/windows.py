"""Windows over a map, and which positions each takes in, along one dimension after the other."""

import math
from dataclasses import dataclass
from typing import NamedTuple

Pair = tuple[int, int]  # vertical, horizontal


@dataclass(frozen=True)
class MapMaximum:
    """The maximum over windows of a ``size``, ``stride`` apart.

    Attributes:
        size, stride: of the windows.
        padding: before the map and behind it; nothing in it is a maximum.
        ceil: whether there is one more window where the last one leaves positions over.
    """

    size: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil: bool = False


@dataclass(frozen=True)
class MapAverage:
    """The mean over windows, as those of :class:`MapMaximum`.

    Attributes:
        counted: whether zeros of the padding count.
        divisor: what sums are divided by instead; 0: by how many are summed.
    """

    size: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil: bool = False
    counted: bool = True
    divisor: int = 0


@dataclass(frozen=True)
class MapMean:
    """The mean over each of ``outputs`` parts that cover a map; 0: as many as it has positions."""

    outputs: Pair = (1, 1)


@dataclass(frozen=True)
class MapNearest:
    """Each position ``factor`` times."""

    factor: Pair


MapWindows = MapMaximum | MapAverage | MapMean | MapNearest


class Window(NamedTuple):
    """Positions from ``begin`` to before ``end``, and by what their sum is divided."""

    begin: int
    end: int
    divisor: int


def windows(operation: MapWindows, axis: int, extent: int) -> list[Window]:
    """Return the windows over so many positions, as torch has them; ``axis`` is 0 for rows.

    A sum over both dimensions is divided by the product of the two.

    >>> windows(MapAverage((3, 3), (2, 2), (1, 1)), 0, 5)
    [Window(begin=0, end=2, divisor=3), Window(begin=1, end=4, divisor=3), ...]
    """
    match operation:
        case MapMean(outputs=outputs):
            parts = outputs[axis] or extent
            bounds = [(k * extent // parts, -((k + 1) * -extent // parts)) for k in range(parts)]
            return [Window(begin, end, end - begin) for begin, end in bounds]
        case MapNearest(factor=factor):
            return [Window(k, k + 1, 1) for k in range(extent) for _ in range(factor[axis])]
    size, stride, padding = operation.size[axis], operation.stride[axis], operation.padding[axis]
    steps = (extent + 2 * padding - size) / stride
    last = math.ceil(steps) if operation.ceil else math.floor(steps)
    if operation.ceil and last * stride >= extent + padding:
        last -= 1  # one that would begin in the padding behind
    found = []
    for begin in range(-padding, last * stride - padding + 1, stride):
        inside = max(begin, 0), min(begin + size, extent)
        counted = min(begin + size, extent + padding) - begin
        found.append(Window(*inside, _divisor(operation, axis, counted, inside[1] - inside[0])))
    return found


def _divisor(operation: MapMaximum | MapAverage, axis: int, counted: int, inside: int) -> int:
    if isinstance(operation, MapMaximum):
        return 1
    if operation.divisor:
        return operation.divisor if axis == 0 else 1
    return counted if operation.counted else inside
