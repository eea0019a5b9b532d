"""What the sparse kernels cost before anything is timed: cycles, by counting.

A tile of t = rows · columns accumulators goes through the kept weights of one output channel after
the other.  With K kept weights, N output channels and T tiles a block of images costs

    T · (K · (w + t · m) + N · t · f)

cycles: w for a weight and its offset, m for a multiply-add whose vector comes from memory, f to
finish a vector of sums (bias, activation, maximum, store).  m depends on how many bytes the
positions that a tile reads take in all channels: within the first-level cache two are loaded in
a cycle.  One image, whose vectors lie along V vectors of positions in tiles of at most 16, costs
the same with t · T = V.  The tiles' order is what matters; the constants are of no machine.
"""

from lossprune.deployment.sparse.steps import Pair, Shape, SparseConvolution, tiles

_WEIGHT = 1.0  # w, cycles
_FINISH = 3.0  # f
_LOADS = ((32 << 10, 0.5), (512 << 10, 1.0))  # bytes that fit a cache, and m there
_FAR = 2.0  # m beyond
_LIKELY = 1.5  # times the cost of the best tile: not worth a try
_MOST = 5  # tiles that are tried
_ACCUMULATORS = 16


def block_cost(
    convolution: SparseConvolution, source: Shape, kept: int, tile: Pair, lanes: int
) -> float:
    """Return the cycles of a convolution over a block of ``lanes`` images.

    Args:
        convolution: what is computed.
        source: (channels, height, width) that it reads.
        kept: weights that are multiplied with.
        tile: (rows, columns).
        lanes: numbers in a vector.

    >>> small = SparseConvolution((1, 1, 1, 1))
    >>> block_cost(small, (1, 2, 2), 1, (2, 2), 16) == 1 * (1 + 4 * 0.5) + 4 * 3
    True
    """
    _, height, width = convolution.convolved(source)
    count = -(-height // tile[0]) * -(-width // tile[1])
    size = tile[0] * tile[1]
    load = _load(4 * lanes * _read(convolution, source, tile))
    outputs = convolution.weight_shape[0]
    return count * (kept * (_WEIGHT + size * load) + outputs * size * _FINISH)


def image_cost(convolution: SparseConvolution, source: Shape, kept: int, lanes: int) -> float:
    """Return the cycles of a convolution over one image; arguments as in :func:`block_cost`."""
    _, height, width = convolution.convolved(source)
    vectors = -(-((height - 1) * (source[2] + convolution.padding[1]) + width) // lanes)
    runs = -(-vectors // _ACCUMULATORS)
    load = _load(4 * _read(convolution, source, (height, width)))
    outputs = convolution.weight_shape[0]
    return kept * (runs * _WEIGHT + vectors * load) + outputs * vectors * _FINISH


def likely_tiles(
    convolution: SparseConvolution, source: Shape, kept: int, lanes: int
) -> list[Pair]:
    """Return the tiles that may be fastest over blocks of images, the likeliest first."""
    costs = {
        tile: block_cost(convolution, source, kept, tile, lanes)
        for tile in tiles(convolution, source)
    }
    least = min(costs.values())
    ordered = sorted(costs, key=costs.__getitem__)
    return [tile for tile in ordered if costs[tile] <= _LIKELY * least][:_MOST]


def _read(convolution: SparseConvolution, source: Shape, tile: Pair) -> int:
    """Return how many numbers of one image the positions of a tile read."""
    _, _, *kernel = convolution.kernel(source)
    rows, columns = (
        (extent - 1) * stride + dilation * (taps - 1) + 1
        for extent, stride, dilation, taps in zip(
            tile, convolution.stride, convolution.dilation, kernel, strict=True
        )
    )
    return source[0] * min(rows, source[1]) * min(columns, source[2])


def _load(size: int) -> float:
    """Return the cycles of a multiply-add whose vector is among ``size`` bytes."""
    return next((cycles for room, cycles in _LOADS if size <= room), _FAR)
