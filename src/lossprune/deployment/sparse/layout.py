"""Steps laid out in memory for one shape of the input, in five passes from values to values.

Where vectors lie along the positions, strided sources are split; then every value gets its shape,
every kept weight the place that it reads from, every value its halo and rows, and its offset.  The
layouts are described in ``sparse_network.c``.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lossprune.deployment.sparse.placing import (
    FeatureMap,
    Part,
    parts_of_joined,
    placed,
    whole_lines,
)
from lossprune.deployment.sparse.steps import (
    MapSplit,
    Pair,
    Shape,
    SparseConvolution,
    SparseStep,
    Weights,
    output_shape,
)


@dataclass(frozen=True)
class Taps:
    """What the kept weights of a convolution read.

    Output position (y, x) reads position (y · stride + dy, x · stride + dx) of ``channel``.

    Attributes:
        value: the map that is read.
        stride: (vertical, horizontal), in that map.
        output, channel, dy, dx: int64 (kept,).
    """

    value: str
    stride: Pair
    output: Tensor
    channel: Tensor
    dy: Tensor
    dx: Tensor


@dataclass(frozen=True)
class SparseLayout:
    """Steps in memory.

    Attributes:
        steps: in order, with the splits.
        shapes: of every value.
        taps: of every convolution, by its target.
        maps: of every value.
        room: numbers that all of them take.
    """

    steps: tuple[SparseStep, ...]
    shapes: Mapping[str, Shape]
    taps: Mapping[str, Taps]
    maps: Mapping[str, FeatureMap]
    room: int


def laid_out(
    steps: Sequence[SparseStep],
    weights: Mapping[str, Weights],
    inputs: Mapping[str, Shape],
    outputs: Collection[str],
    *,
    blocked: bool,
    lanes: int,
) -> SparseLayout:
    """Return where everything lies, where vectors are of ``lanes`` numbers and blocks of images.

    What is read and written is as in ``planned``; weights are by the steps' targets.

    Raises:
        PruningError: the inputs do not fit the steps.
    """
    steps = list(steps) if blocked else with_splits(steps)
    shapes = value_shapes(steps, inputs)
    taps = {
        step.target: _taps(step, step.operation, weights[step.target], shapes, blocked)
        for step in steps
        if isinstance(step.operation, SparseConvolution)
    }
    parts = parts_of_joined(steps, shapes, inputs)
    halos = _alike(halo_widths(steps, taps, shapes), parts)
    vector = 1 if blocked else lanes
    maps = {name: unplaced_map(shape, halos[name], vector) for name, shape in shapes.items()}
    uses = [{*step.reads, step.target} for step in steps]
    for step, used in zip(steps, uses, strict=True):
        if step.target in taps:
            used.add(taps[step.target].value)
    maps, end = placed(uses, maps, parts, inputs, outputs)
    # A tile may read one vector per accumulator past the end of the last map.
    furthest = max((m.row * (m.halo + 1) for m in maps.values()), default=0)
    room = (end + 17 * vector + furthest) * (lanes if blocked else 1)
    return SparseLayout(tuple(steps), shapes, taps, maps, whole_lines(room))


def with_splits(steps: Sequence[SparseStep]) -> list[SparseStep]:
    """Put a split of its source before each strided convolution, one for each source and stride.

    This is for vectors along the positions: those are of neighbours, which a stride would tear
    apart.
    """
    out: list[SparseStep] = []
    for step in steps:
        match step.operation:
            case SparseConvolution(stride=stride) if stride != (1, 1):
                split = SparseStep(
                    f"split of {step.name}", step.reads[:1], _split_name(step, stride),
                    MapSplit(stride),
                )  # fmt: skip
                if all(split.target != other.target for other in out):
                    out.append(split)
        out.append(step)
    return out


def _split_name(step: SparseStep, stride: Pair) -> str:
    return f"{step.source} by {stride[0]}x{stride[1]}"


def value_shapes(steps: Sequence[SparseStep], inputs: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shape of every value.

    Raises:
        PruningError: the inputs do not fit the steps.
    """
    shapes = dict(inputs)
    for step in steps:
        shapes[step.target] = output_shape(step, shapes)
    return shapes


def _taps(
    step: SparseStep,
    convolution: SparseConvolution,
    weights: Weights,
    shapes: Mapping[str, Shape],
    blocked: bool,
) -> Taps:
    positions, source = weights.positions, step.source
    outputs, inputs, height, width = convolution.kernel(shapes[source])
    output = positions // (width * height * inputs)
    group = output // (outputs // convolution.groups)
    channel = positions // (width * height) % inputs + group * inputs
    dy = positions // width % height * convolution.dilation[0] - convolution.padding[0]
    dx = positions % width * convolution.dilation[1] - convolution.padding[1]
    sy, sx = convolution.stride
    if blocked or (sy, sx) == (1, 1):
        return Taps(source, (sy, sx), output, channel, dy, dx)
    channel = (channel * sy + dy % sy) * sx + dx % sx
    # Floor, of negative numbers too.
    return Taps(_split_name(step, (sy, sx)), (1, 1), output, channel, dy // sy, dx // sx)


def halo_widths(
    steps: Sequence[SparseStep], taps: Mapping[str, Taps], shapes: Mapping[str, Shape]
) -> dict[str, int]:
    """Return how far beyond each map a convolution reads; nothing of maps that none reads so."""
    halos: dict[str, int] = {}
    for step in steps:
        match step.operation:
            case SparseConvolution() as convolution if taps[step.target].output.numel():
                read = taps[step.target]
                _, height, width = shapes[read.value]
                _, rows, columns = convolution.convolved(shapes[step.source])
                beyond = max(
                    halos.get(read.value, 0), -int(read.dy.min()), -int(read.dx.min()),
                    int(read.dy.max()) + (rows - 1) * read.stride[0] - (height - 1),
                    int(read.dx.max()) + (columns - 1) * read.stride[1] - (width - 1),
                )  # fmt: skip
                halos[read.value] = beyond
    return halos


def _alike(halos: Mapping[str, int], parts: Mapping[str, Part]) -> Mapping[str, int]:
    """Return the halos of all values, where those in one joined map have the widest of theirs."""
    found = defaultdict[str, int](int, halos)
    for name, part in parts.items():
        found[part.whole] = max(found[part.whole], found[name])
    for name, part in parts.items():
        found[name] = found[part.whole]
    return found


def unplaced_map(shape: Shape, halo: int, vector: int) -> FeatureMap:
    """Return the rows and planes of a map whose vectors are of ``vector`` elements; at offset 0."""
    channels, height, width = shape
    row = width + halo
    origin = halo * row + halo
    plane = origin + (height + halo) * row
    if plane > 1:
        plane += vector - 1  # the last vector of the last row may reach past it
    return FeatureMap(0, plane, row, origin, height, width, halo, channels)
