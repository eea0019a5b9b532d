"""Steps as a plan: the layout's values in the structs that the compiled kernels read."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lossprune.deployment.sparse.layout import SparseLayout, laid_out
from lossprune.deployment.sparse.placing import whole_lines
from lossprune.deployment.sparse.plan import (
    MapStruct,
    OperationKind,
    OperationStruct,
    SparsePlan,
)
from lossprune.deployment.sparse.steps import (
    LARGEST,
    ChannelScales,
    MapActivation,
    MapJoin,
    MapNorm,
    MapProduct,
    MapSplit,
    MapSum,
    Pair,
    Shape,
    SparseConvolution,
    SparseStep,
    Weights,
    tiles,
)
from lossprune.deployment.sparse.token_emission import set_patches_, set_token_, token_room
from lossprune.deployment.sparse.token_steps import (
    OF_TOKENS,
    RowNorm,
    TokenOperation,
    TokenPatches,
    TokenShift,
    images_among,
    single_values,
)
from lossprune.deployment.sparse.visits import chunks_of, visits
from lossprune.deployment.sparse.windows import (
    MapAverage,
    MapMaximum,
    MapMean,
    MapNearest,
    windows,
)
from lossprune.kernels.interface import Activation
from lossprune.pruning.errors import PruningError

FLOAT = 4  # bytes
_ALONE = 4  # input channels of a group: those of depthwise convolutions, and of others no more


def planned(
    steps: Sequence[SparseStep],
    weights: Sequence[Weights],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str],
    chosen: Mapping[str, Pair],
    *,
    vectors: int,
    lanes: int,
) -> SparsePlan:
    """Return steps in memory, ready to run.

    Args:
        steps: in order.
        weights: of each step.
        inputs: the shapes of what is read, by name.
        outputs: the names of what is written.
        chosen: the tiles of convolutions, by target; where none is, or it does not fit, the best
            guess is taken.
        vectors: that an element is: one of images, ``ROW_VECTORS`` of rows; 0: it is one number.
        lanes: numbers of a vector, as the kernels that run it are built.

    Raises:
        PruningError: the inputs do not fit the steps, or are too large for the kernels.
    """
    own = {step.target: weight for step, weight in zip(steps, weights, strict=True)}
    unit = max(1, vectors * lanes)
    layout = laid_out(
        steps, own, inputs, outputs, blocked=vectors > 0, lanes=unit if vectors else lanes
    )
    tile_of = {
        step.target: _tile(step.operation, layout.shapes[step.source], chosen.get(step.target))
        if vectors
        else (1, _line_vectors(_line(step, step.operation, layout), lanes))
        for step in layout.steps
        if isinstance(step.operation, SparseConvolution)
    }
    pointed = {}
    for step in layout.steps:
        chunks = 1
        if step.target in tile_of:
            chunks = _chunks(step, layout, tile_of[step.target], vectors, lanes)
        found = _pointed(step, own, layout, unit, chunks)
        pointed[step.target] = {field: _in_memory(tensor) for field, tensor in found.items()}
    made = [
        _operation(step, layout, tile_of.get(step.target), pointed[step.target])
        for step in layout.steps
    ]
    single = single_values(steps, dict.fromkeys(inputs, False))
    for step, operation in zip(layout.steps, made, strict=True):
        operation.single = step.source in single
    images = images_among(steps)
    reads, writes = _ends(layout, list(inputs), outputs, single)
    for step in steps:
        if isinstance(step.operation, TokenPatches):
            place = MapStruct(*layout.maps[step.target])
            set_patches_(reads[list(inputs).index(step.source)], step.operation, place)
    operations = [*reads, *made, *writes]
    lines = [_line_room(one, vectors, lanes) for one in made]
    rooms = [token_room(step.operation) for step in steps]
    return SparsePlan(
        operations=(OperationStruct * len(operations))(*operations),
        outputs=tuple(layout.shapes[name] for name in outputs),
        single=frozenset(single),
        vectors=vectors,
        element=unit,
        tokens=any(isinstance(step.operation, OF_TOKENS) for step in steps),
        patches=max((one.tokens for one in images.values()), default=0),
        room=layout.room,
        scratch=whole_lines(max([*lines, *(own for own, _ in rooms)], default=0)),
        token_scratch=max((each for _, each in rooms), default=0),
        work=sum(
            pointed[step.target]["value"].numel() * one.height * one.width
            for step, one in zip(layout.steps, made, strict=True)
            if step.target in tile_of
        ),
        keep=tuple(tensor for tensors in pointed.values() for tensor in tensors.values()),
        spaces=deque(),
    )


def _line_room(one: OperationStruct, vectors: int, lanes: int) -> int:
    """Return the numbers of an operation's sums, before they are what it gives."""
    if one.window:
        return one.source.width * max(1, vectors * lanes) + lanes
    if one.kind != OperationKind.CONVOLUTION:
        return 0
    if vectors == 1:
        # Room for the largest tile of each output channel: ``with_tile`` tries others.
        return one.target.channels * LARGEST * lanes
    line = (one.height - 1) * one.source.row + one.width + 2 * LARGEST * lanes
    return line * (one.target.channels if one.chunks > 1 else 1)


def _ends(
    layout: SparseLayout, inputs: Sequence[str], outputs: Sequence[str], single: Collection[str]
) -> tuple[list[OperationStruct], list[OperationStruct]]:
    """Return what reads each input, and what writes each output."""
    tensors = enumerate(outputs, start=len(inputs))
    reads = [_between(OperationKind.READ, layout, name, k) for k, name in enumerate(inputs)]
    writes = [_between(OperationKind.WRITE, layout, name, k) for k, name in tensors]
    for name, operation in zip(outputs, writes, strict=True):
        operation.single = name in single
    return reads, writes


def _between(kind: OperationKind, layout: SparseLayout, name: str, tensor: int) -> OperationStruct:
    """Return what reads an input, or writes an output: the tensor of that index in the call."""
    place = MapStruct(*layout.maps[name])
    return OperationStruct(kind=kind, source=place, target=place, tensor=tensor)


def _tile(convolution: SparseConvolution, source: Shape, chosen: Pair | None) -> Pair:
    """Return the tile that was chosen, where it fits, else the best guess."""
    fitting = tiles(convolution, source)
    return chosen if chosen in fitting else fitting[0]


def _line(step: SparseStep, convolution: SparseConvolution, layout: SparseLayout) -> int:
    """Return how many positions of one image lie from a convolution's first to its last output."""
    _, height, width = convolution.convolved(layout.shapes[step.source])
    return (height - 1) * layout.maps[layout.taps[step.target].value].row + width


def _line_vectors(length: int, lanes: int) -> int:
    """Return how many vectors of a line are computed together: as few, equal parts as can be."""
    vectors = -(-length // lanes)
    return -(-vectors // -(-vectors // LARGEST))


def _chunks(step: SparseStep, layout: SparseLayout, tile: Pair, vectors: int, lanes: int) -> int:
    """Return how many chunks of input channels a tile of blocks, or of a line, is summed over."""
    taps = layout.taps[step.target]
    source, outputs = layout.maps[taps.value], layout.maps[step.target].channels
    kept = len(taps.output) / outputs
    if vectors > 1:
        return chunks_of(source.channels, vectors * lanes * FLOAT, kept, vectors)
    if not kept or layout.maps[step.target].plane == 1:
        return 1
    if isinstance(step.operation, SparseConvolution) and step.operation.weight_shape[1] <= _ALONE:
        return 1
    rows, columns = (int(shift.max() - shift.min()) for shift in (taps.dy, taps.dx))
    if vectors:
        (height, width), (down, right) = tile, taps.stride
        read = ((height - 1) * down + 1 + rows) * ((width - 1) * right + 1 + columns) * lanes
    else:
        read = tile[1] * lanes + rows * source.row + columns
    return chunks_of(source.channels, read * FLOAT, kept, tile[0] * tile[1])


def _pointed(
    step: SparseStep,
    weights: Mapping[str, Weights],
    layout: SparseLayout,
    unit: int,
    chunks: int,
) -> dict[str, Tensor]:
    """Return the tensors that a step's operation points to, by field."""
    match step.operation:
        case SparseConvolution():
            own = weights[step.target]
            taps = layout.taps[step.target]
            source = layout.maps[taps.value]
            offset = (taps.channel * source.plane + taps.dy * source.row + taps.dx) * unit
            outputs = step.operation.weight_shape[0]
            order = visits(taps.output, taps.channel, outputs, source.channels, chunks)
            return {
                "total": order.total,
                "visit": order.visit,
                "begin": order.begin,
                "offset": offset[order.order],
                "value": own.values[order.order],
                "shift": own.shift,
            }
        case ChannelScales() | RowNorm() | MapNorm():
            return {"scale": weights[step.target].scale, "shift": weights[step.target].shift}
        case TokenShift():
            return {"shift": weights[step.target].shift}
        case MapMaximum() | MapAverage() | MapMean() | MapNearest() as operation:
            _, *extents = layout.shapes[step.source]
            found = [windows(operation, axis, extent) for axis, extent in enumerate(extents)]
            return {"window": torch.tensor(found[0] + found[1])}
    return {}


def _in_memory(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else torch.int32
    if dtype == torch.int32 and tensor.numel() and int(tensor.max()) >= 2**31:
        raise PruningError("an input of this size is too large for the sparse kernels")
    return tensor.detach().to(dtype).contiguous()


def _operation(
    step: SparseStep,
    layout: SparseLayout,
    tile: Pair | None,
    pointed: Mapping[str, Tensor],
) -> OperationStruct:
    maps = layout.maps
    made = OperationStruct(
        source=MapStruct(*maps[step.source]), target=MapStruct(*maps[step.target]), pool=1
    )
    for field, name in zip(("other", "third", "bias"), step.reads[1:], strict=False):
        setattr(made, field, MapStruct(*maps[name]))
    made.stride_y = made.stride_x = 1
    made.low, made.high = getattr(step.operation, "numbers", (0.0, 0.0))
    made.activation = getattr(step.operation, "activation", Activation.IDENTITY)
    made.spread = getattr(step.operation, "spread", False)
    for field, tensor in pointed.items():
        setattr(made, field, tensor.data_ptr())
    source = layout.shapes[step.source]
    match step.operation:
        case SparseConvolution() as convolution:
            taps = layout.taps[step.target]
            made.kind = OperationKind.CONVOLUTION
            made.source, made.pool = MapStruct(*maps[taps.value]), convolution.pool
            made.stride_y, made.stride_x = taps.stride
            # Rows and columns that no window of the maximum takes in are not computed.
            _, *extents = convolution.convolved(source)
            made.height, made.width = (n // made.pool * made.pool for n in extents)
            assert tile is not None
            made.tile_y, made.tile_x = tile
            made.alike = convolution.weight_shape[0] // convolution.groups
            made.chunks = len(pointed["visit"])
        case ChannelScales():
            made.kind = OperationKind.AFFINE
        case MapSum(minus=minus):
            made.kind = OperationKind.DIFFERENCE if minus else OperationKind.ADDITION
        case MapProduct():
            made.kind = OperationKind.PRODUCT
        case MapJoin():
            made.kind = OperationKind.JOIN
        case MapMaximum() | MapNearest():
            made.kind = OperationKind.MAXIMUM
        case MapMean() | MapAverage():
            made.kind = OperationKind.MEAN
        case MapSplit(stride=stride):
            made.kind, made.stride_y, made.stride_x = OperationKind.SPLIT, *stride
        case MapActivation():
            raise TypeError(f"{step.name}: an activation alone runs as scales of 1")
        case operation if isinstance(operation, TokenOperation | MapNorm):
            set_token_(made, operation)
    return made
