"""Sparse parts of a network as a file holds them, and back, each number checked.

The kernels read and write memory at the places that the steps and positions say: nothing of a file
reaches them that could lead them out of it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossprune.deployment.saved.format import Arrays, SavedPart
from lossprune.deployment.sparse.network import SparseNetwork
from lossprune.deployment.sparse.steps import (
    ChannelScales,
    MapJoin,
    MapNorm,
    MapProduct,
    MapSum,
    SparseConvolution,
    SparseOperation,
    SparseStep,
    Weights,
)
from lossprune.deployment.sparse.token_steps import (
    OF_TOKENS,
    RowNorm,
    TokenAttention,
    TokenMean,
    TokenPatches,
    TokenPick,
    TokenShift,
    misfit,
    single_values,
)
from lossprune.deployment.sparse.windows import MapAverage, MapMaximum, MapMean, MapNearest
from lossprune.pruning.errors import PruningError

# How many values a step may read, by its operation; of others there are none in finished networks.
_READS: Mapping[type[SparseOperation], tuple[int, ...]] = {
    SparseConvolution: (1, 2),
    ChannelScales: (1,),
    MapSum: (2,),
    MapProduct: (2,),
    MapNorm: (1,),
    MapJoin: (2,),
    MapMaximum: (1,),
    MapAverage: (1,),
    MapMean: (1,),
    MapNearest: (1,),
    RowNorm: (1,),
    TokenShift: (1,),
    TokenAttention: (3, 4),
    TokenMean: (1,),
    TokenPick: (1,),
    TokenPatches: (1,),
}
_MOST = 2**31  # numbers of anything
_FARTHEST = 2**16  # of strides, paddings, dilations and windows: maps have fewer rows
_GAPS = (np.uint8, np.uint16, np.uint32)


def part_of(network: SparseNetwork, prefix: str) -> tuple[SavedPart, dict[str, Any]]:
    """Return a sparse part and its arrays, whose names begin with ``prefix``.

    Positions are the numbers of removed weights before each kept one, in the fewest bytes.
    """
    arrays: dict[str, Any] = {}
    for k, weights in enumerate(network.weights()):
        found = {
            "gaps": _gaps(weights.positions.numpy()),
            "values": weights.values.numpy(),
            "scale": weights.scale.numpy(),
            "shift": weights.shift.numpy(),
        }
        arrays |= {f"{prefix}.{k}.{name}": array for name, array in found.items() if array.size}
    saved = SavedPart(
        network.steps, network.inputs, network.outputs, network.tuning, rows=network.rows
    )
    return saved, arrays


def _gaps(positions: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    gaps = np.diff(positions, prepend=-1) - 1
    most = int(gaps.max(initial=0))
    return gaps.astype(next(kind for kind in _GAPS if most <= np.iinfo(kind).max))


def network_of(part: SavedPart, arrays: Arrays, prefix: str) -> SparseNetwork:
    """Return the sparse part that :func:`part_of` was given.

    Raises:
        ValueError: its steps or its arrays contradict each other.
    """
    known = set(part.inputs)
    if not known or len(known) != len(part.inputs):
        raise ValueError("a part's inputs have no names of their own")
    weights = []
    for k, step in enumerate(part.steps):
        count = _READS.get(type(step.operation), ())
        if len(step.reads) not in count or not known.issuperset(step.reads) or step.target in known:
            raise ValueError(f"{step.name!r} does not read and write as its operation does")
        known.add(step.target)
        _check_operation(step)
        weights.append(_weights(step, arrays, f"{prefix}.{k}"))
    names = [name for name, _ in part.outputs]
    if not names or not known.issuperset(names) or len(set(names)) != len(names):
        raise ValueError("a part's outputs are not all computed")
    _check_tokens(part)
    made = SparseNetwork(part.steps, weights, part.inputs, part.outputs, rows=part.rows)
    return made.retune_(part.tuning)


def _check_tokens(part: SavedPart) -> None:
    """Raise ValueError where steps on tokens read what are none."""
    if any(isinstance(step.operation, OF_TOKENS) for step in part.steps):
        try:
            single_values(part.steps, dict.fromkeys(part.inputs, False))
        except PruningError as error:
            raise ValueError(str(error)) from None
        if not part.rows or misfit(part.steps, part.inputs):
            raise ValueError("its tokens are none of the same examples")


def _check_operation(step: SparseStep) -> None:
    """Raise ValueError unless the kernels know an operation of these numbers."""
    good = not any(map(math.isnan, getattr(step.operation, "numbers", ())))
    match step.operation:
        case SparseConvolution(weight_shape=shape, groups=groups, pool=pool) as one:
            pooled = len(step.reads) == 1 and one.stride[1] <= 2
            good = (
                good and min(*shape, groups) >= 1 and shape[0] % groups == 0
                and (pool == 1 or (pool == 2 and pooled))
                and all(1 <= n <= _FARTHEST for n in (*one.stride, *one.dilation))
                and max(*one.padding, *shape[2:]) <= _FARTHEST
                and (not one.flat or shape[2:] == (1, 1))
            )  # fmt: skip
        case MapMaximum() | MapAverage() as one:
            halves = zip(one.padding, one.size, strict=True)
            good = all(1 <= n <= _FARTHEST for n in (*one.size, *one.stride)) and all(
                2 * pad <= size
                for pad, size in halves  # or windows would take in nothing
            )
            good = good and getattr(one, "divisor", 0) < _FARTHEST**2
        case MapMean(outputs=counts):
            good = max(counts) <= _FARTHEST
        case MapNearest(factor=counts):
            good = all(1 <= n <= _FARTHEST for n in counts)
        case ChannelScales(channels=channels):
            good = good and channels >= 1
        case (
            RowNorm(features=features, epsilon=epsilon)
            | MapNorm(channels=features, epsilon=epsilon)
        ):
            good = features >= 1 and 0 < epsilon < math.inf
        case TokenShift(tokens=tokens, features=features):
            good = min(tokens, features) >= 1 and tokens * features < _MOST
        case TokenAttention(heads=heads, key_heads=fewer, scale=scale) as one:
            sizes = heads, fewer, one.size, one.value_size
            good = (
                min(sizes) >= 1 and max(*sizes, one.query, one.key, one.values) < _MOST
                and heads % fewer == 0 and 0 < scale < math.inf
            )  # fmt: skip
        case TokenPick(place=place):
            good = place < _MOST
        case TokenPatches(channels=channels, height=height, width=width, size=size) as one:
            good = (
                1 <= channels < _MOST and one.leading < _MOST
                and 1 <= size[0] <= height <= _FARTHEST and 1 <= size[1] <= width <= _FARTHEST
            )  # fmt: skip
    if not good:
        raise ValueError(f"{step.name!r} is an operation that the kernels do not know")


def _weights(step: SparseStep, arrays: Arrays, prefix: str) -> Weights:
    gaps = arrays.get(f"{prefix}.gaps", np.zeros(0, np.uint8))
    values, scale, shift = (_floats(arrays, f"{prefix}.{n}") for n in ("values", "scale", "shift"))
    sizes, most = (0, 0), 0
    match step.operation:
        case SparseConvolution(weight_shape=shape):
            sizes, most = (0, shape[0]), int(np.prod(shape, dtype=object))
        case (
            ChannelScales(channels=channels)
            | RowNorm(features=channels)
            | MapNorm(channels=channels)
        ):
            sizes = channels, channels
        case TokenShift(tokens=tokens, features=features):
            sizes = 0, tokens * features
    if (len(scale), len(shift)) != sizes or gaps.ndim != 1 or gaps.dtype not in _GAPS:
        raise ValueError(f"the weights of {step.name!r} do not fit it")
    positions = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if len(positions) != len(values) or (len(positions) and positions[-1] >= most):
        raise ValueError(f"{step.name!r} has weights where it has none")
    return Weights(shift=shift, scale=scale, positions=torch.from_numpy(positions), values=values)


def _floats(arrays: Arrays, name: str) -> Tensor:
    array = arrays.get(name, np.zeros(0, np.float32))
    if array.ndim != 1 or array.dtype != np.float32:
        raise ValueError(f"{name} are not numbers in single precision")
    return torch.from_numpy(array.copy())
