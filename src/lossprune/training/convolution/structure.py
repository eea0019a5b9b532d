"""The kept weights of a convolution, ordered as the kernels go through them."""

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lossprune.training.convolution.geometry import (
    Axis,
    Pair,
    Segment,
    Window,
    input_segments,
    output_segments,
    windows,
    work,
)
from lossprune.training.convolution.kernel import KERNELS, PassStruct, lanes

# Bytes of a patch that stays in the first cache beside the sums, and of one that is larger, so that
# the sums are not fetched for a few entries only.
CACHED, MOST_CACHED = 32 << 10, 96 << 10
# Entries of an output channel in a chunk for which its sums are worth fetching.
_ENTRIES = 8
# Multiplications with zeros beyond the map, as a share of all others, from which the rim is apart.
_WASTED = 0.5
# Time of a multiply-add of a kept weight, and of turning a number from one layout into the other in
# both directions, in those of one of torch's dense multiply-adds (docs/training.md).
_SPARSE, _TURNED = 1.6, 90.0
# Vectors' worth of time that an entry takes beside the multiplications of its tile.
_ENTRY = 2.5


@dataclass(frozen=True)
class Convolution:
    """What a layer computes, over maps of one size.

    Attributes:
        shape: (channels, height, width) of an input.
        kernel: (outputs, inputs of a group, rows, columns).
    """

    shape: tuple[int, int, int]
    kernel: tuple[int, int, int, int]
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Of rows and columns."""
        found = []
        for size, taps, s, p, d in zip(
            self.shape[1:], self.kernel[2:], self.stride, self.padding, self.dilation, strict=True
        ):
            found.append(Axis(size, (size + 2 * p - d * (taps - 1) - 1) // s + 1, taps, s, p, d))
        return found[0], found[1]

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an output."""
        y, x = self.axes
        return self.kernel[0], y.outputs, x.outputs


def dense_is_faster(layer: Convolution, kept: int) -> bool:
    """Whether torch computes a step with all weights in less time than the kernels with the kept.

    By a count and not by timing, which would let a run that is resumed choose otherwise.  Torch's
    layout has to be turned into blocks and back around the layer.
    """
    channels, height, width = layer.output_shape
    maps = math.prod(layer.shape) + channels * height * width
    positions = height * width
    dense = positions * math.prod(layer.kernel) + _TURNED * maps
    return _SPARSE * positions * kept > dense


@dataclass(frozen=True)
class Passes:
    """What one call of the kernels goes through.

    Attributes:
        structs: the passes in memory.
        index: which of the kept weights an entry is, for the entries of all passes: int32.
        keep: what the structs point to.
    """

    structs: ctypes.Array[PassStruct]
    index: Tensor
    keep: tuple[Tensor, ...]


def output_passes(layer: Convolution, kept: Tensor, blocks: int, parts: int) -> Passes:
    """The passes of the outputs, and of the weights' gradient.

    Args:
        layer: what is computed.
        kept: positions of the kept weights in the flattened kernel, ascending: int64.
        blocks: of images.
        parts: that the output channels of a pass are in, one for each thread.
    """
    o, i, ky, kx = _coordinates(layer, kept)
    return _passes(_windows(layer, output_segments), (o, i, ky, kx), layer.kernel[0],
                   layer.shape[0], blocks, parts)  # fmt: skip


def input_passes(layer: Convolution, kept: Tensor, blocks: int, parts: int) -> Passes:
    """The passes of the inputs' gradient, which reads that of the outputs; as above."""
    o, i, ky, kx = _coordinates(layer, kept)
    return _passes(_windows(layer, input_segments), (i, o, ky, kx), layer.shape[0],
                   layer.kernel[0], blocks, parts)  # fmt: skip


def _coordinates(layer: Convolution, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output channel, input channel, row and column of the kept weights."""
    outputs, inputs, rows, columns = layer.kernel
    o = kept // (inputs * rows * columns)
    group = o // (outputs // layer.groups)
    i = kept // (rows * columns) % inputs + group * inputs
    return o, i, kept // columns % rows, kept % columns


def _windows(layer: Convolution, segments: Callable[..., list[Segment]]) -> list[Window]:
    y, x = layer.axes
    together, apart = (
        windows(segments(y, apart=apart), segments(x, apart=apart)) for apart in (False, True)
    )
    return apart if work(together) > (1 + _WASTED) * work(apart) else together


def _passes(
    found: Sequence[Window],
    coordinates: tuple[Tensor, Tensor, Tensor, Tensor],
    outputs: int,
    inputs: int,
    blocks: int,
    parts: int,
) -> Passes:
    structs = (PassStruct * len(found))()
    indices, keep = [], []
    entry = 0
    for struct, window in zip(structs, found, strict=True):
        index, kept = _fill(struct, window, coordinates, outputs, inputs, blocks, parts)
        struct.entry = entry
        entry += len(index)
        indices.append(index)
        keep += kept
    return Passes(structs, torch.cat(indices).int(), tuple(keep))


def _fill(
    struct: PassStruct,
    window: Window,
    coordinates: tuple[Tensor, Tensor, Tensor, Tensor],
    outputs: int,
    inputs: int,
    blocks: int,
    parts: int,
) -> tuple[Tensor, list[Tensor]]:
    o, i, ky, kx = coordinates
    y, x = window.y, window.x
    tile_y, tile_x, together = _tile(window, blocks)
    patch_y, patch_x = (tile_y - 1) * y.stride + y.reach, (tile_x - 1) * x.stride + x.reach
    across = math.ceil(patch_x / x.stride)
    vectors = patch_y * across * x.stride * together
    channels = _channels(inputs, vectors * 4 * lanes(), len(o) / (inputs * outputs))
    first = torch.arange(0, inputs + channels, channels).clamp_(max=inputs)
    chunks = math.ceil(inputs / channels)
    first = first[: chunks + 1]
    rows, columns = torch.full((_taps(ky),), -1), torch.full((_taps(kx),), -1)
    for (tap_y, tap_x), (row, column) in window.taps:
        if tap_y < len(rows) and tap_x < len(columns):
            rows[tap_y], columns[tap_x] = row - y.start, column - x.start
    row, column = rows[ky], columns[kx]
    index = ((row >= 0) & (column >= 0)).nonzero()[:, 0]
    o, i, row, column = o[index], i[index], row[index], column[index]
    chunk = i // channels
    column = column % x.stride * across + column // x.stride
    offset = (((i - chunk * channels) * patch_y + row) * across * x.stride + column) * together
    part = _parts(torch.bincount(o, minlength=outputs), parts)
    order, keep = _visits(chunk, o, offset, part, chunks)
    keep += [first.int(), offset[order].int() * lanes()]
    struct.chunks, struct.parts, struct.outputs = chunks, parts, outputs
    struct.tile_y, struct.tile_x, struct.blocks = tile_y, tile_x, together
    struct.origin_y, struct.origin_x = y.origin, x.origin
    struct.count_y, struct.count_x = y.count, x.count
    struct.step_y, struct.step_x = y.step, x.step
    struct.from_y, struct.from_x = y.start, x.start
    struct.stride_y, struct.stride_x = y.stride, x.stride
    struct.patch_y, struct.patch_x = patch_y, patch_x
    struct.room = channels * vectors
    for name, tensor in zip(
        ("part", "visit", "output", "begin", "first", "offset"), keep, strict=True
    ):
        setattr(struct, name, tensor.data_ptr())
    return index[order], keep


def _parts(entries: Tensor, parts: int) -> Tensor:
    """First output channels of parts with equal numbers of entries: (parts + 1,), int64.

    A channel costs something even without an entry.
    """
    done = (entries + 2).cumsum(0)
    wanted = done[-1] * torch.arange(1, parts) / parts
    inner = torch.searchsorted(done, wanted.to(done.dtype), right=True)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(entries))])


def _visits(
    chunk: Tensor, output: Tensor, offset: Tensor, part: Tensor, chunks: int
) -> tuple[Tensor, list[Tensor]]:
    """The order of the entries; and parts, visits, their channels and entries, as in a Pass."""
    parts, outputs = len(part) - 1, int(part[-1])
    group = chunk * parts + (torch.searchsorted(part, output, right=True) - 1)
    pair = group * outputs + output
    found, place, count = pair.unique(return_inverse=True, return_counts=True)
    # By group, then by the number of entries.
    by_count = torch.argsort(count, stable=True)
    visits = by_count[torch.argsort(found[by_count] // outputs, stable=True)]
    rank = torch.empty_like(visits)
    rank[visits] = torch.arange(len(visits))
    order = torch.argsort(rank[place] * (1 + int(offset.max()) if len(offset) else 1) + offset)
    begin = torch.cat([count.new_zeros(1), count[visits].cumsum(0)])
    sizes = torch.bincount(found // outputs, minlength=chunks * parts)
    visit = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return order, [part.int(), visit.int(), (found[visits] % outputs).int(), begin.int()]


def _taps(coordinate: Tensor) -> int:
    return int(coordinate.max()) + 1 if len(coordinate) else 0


def _channels(inputs: int, size: int, entries: float) -> int:
    """Input channels of a chunk, by the bytes of a patch of one and its entries for an output."""
    worth = math.ceil(_ENTRIES / entries) if entries else inputs
    channels = min(max(worth, CACHED // size), MOST_CACHED // size)
    return min(inputs, max(1, channels))


def _tile(window: Window, blocks: int) -> tuple[int, int, int]:
    """Rows, columns and blocks of a tile: least time by a count of vectors."""
    y, x = window.y, window.x
    best, least = (1, 1, 1), math.inf
    for (rows, width), together in product(KERNELS, range(1, min(blocks, 16) + 1)):
        if width % together:
            continue
        columns = width // together
        tiles = math.ceil(y.count / rows) * math.ceil(x.count / columns)
        tiles *= math.ceil(blocks / together)
        patch = ((rows - 1) * y.stride + y.reach) * ((columns - 1) * x.stride + x.reach)
        time = tiles * (rows * width + _ENTRY + 0.05 * patch * together)
        if time < least:
            best, least = (rows, columns, together), time
    return best
