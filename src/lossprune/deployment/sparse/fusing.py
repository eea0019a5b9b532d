"""Fewer steps for the same: what follows a convolution becomes part of it.

Batch norm goes into its weights, an addition, an activation and a maximum over 2×2 into its end.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from lossprune.deployment.sparse.lowering import Lowered
from lossprune.deployment.sparse.steps import (
    ChannelScales,
    MapActivation,
    MapProduct,
    MapSum,
    SparseConvolution,
    SparseStep,
    Weights,
)
from lossprune.deployment.sparse.windows import MapMaximum
from lossprune.kernels.interface import Activation

# The maximum of these is theirs of the maximum.
_INCREASING = (
    Activation.IDENTITY, Activation.RELU, Activation.TANH, Activation.SIGMOID, Activation.CLAMP,
    Activation.HARDSIGMOID,
)  # fmt: skip


def joined(parts: Sequence[Lowered], kept: Collection[str]) -> list[Lowered]:
    """Return the same steps, fewer: what follows a convolution alone becomes part of it.

    Args:
        parts: steps in order.
        kept: values that are read from outside, so must stay.
    """
    readers = Counter(name for step, _ in parts for name in step.reads)
    out: list[Lowered] = []
    places: dict[str, int] = {}  # of the steps that make values, in `out`
    for part in parts:
        step, _ = part
        place, joint = len(out), None
        for name in step.reads:
            if name not in places or name in kept or readers[name] != 1:
                continue
            # What else it reads must be there already where it is computed then.
            if all(places.get(other, -1) < places[name] for other in step.reads if other != name):
                joint = _join(out[places[name]], part, name)
            if joint is not None:
                place = places.pop(name)
                break
        out[place : place + 1] = [joint or part]
        places[step.target] = place
    return out


def _join(first: Lowered, second: Lowered, through: str) -> Lowered | None:
    """Return one step for two, where there is one; ``through`` is the value between them."""
    (step, weights), (after, more) = first, second
    reads, operation = step.reads, step.operation
    match step.operation, after.operation:
        case (
            SparseConvolution(activation=Activation.IDENTITY, pool=1)
            | ChannelScales(activation=Activation.IDENTITY)
            | MapSum(activation=Activation.IDENTITY)
            | MapProduct(activation=Activation.IDENTITY) as before,
            MapActivation(activation=activation, numbers=numbers),
        ):
            operation = replace(before, activation=activation, numbers=numbers)
        case (
            SparseConvolution(activation=Activation.IDENTITY, pool=1) as before,
            ChannelScales(),
        ) if len(reads) == 1:
            weights = _scaled(weights, more, before)
        case (
            SparseConvolution(activation=Activation.IDENTITY, pool=1),
            MapSum(spread=False, minus=False),
        ) if len(reads) == 1:
            reads = (*reads, *(name for name in after.reads if name != through))
        # No tile of the kernels has two columns at strides beyond 2.
        case (
            SparseConvolution(pool=1, stride=(_, 1 | 2)) as before,
            MapMaximum(size=(2, 2), stride=(2, 2), padding=(0, 0), ceil=False),
        ) if len(reads) == 1 and before.activation in _INCREASING:
            operation = replace(before, pool=2)
        case _:
            return None
    return SparseStep(step.name, reads, after.target, operation), weights


def _scaled(weights: Weights, scales: Weights, convolution: SparseConvolution) -> Weights:
    """Return a convolution's weights times the scales of the affine map that follows it."""
    each = math.prod(convolution.weight_shape[1:])
    scale = scales.scale.double()
    values = weights.values.double() * scale[weights.positions // each]
    shift = weights.shift.double() * scale + scales.shift.double()
    return replace(weights, shift=shift.float(), values=values.float())


def with_scales(part: Lowered, channels: int) -> Lowered:
    """Give an activation that stands alone its scales 1 and shifts 0."""
    match part[0].operation:
        case MapActivation(activation=activation, numbers=numbers):
            scales = ChannelScales(channels, activation, numbers)
            ones, zeros = torch.ones(channels), torch.zeros(channels)
            return replace(part[0], operation=scales), Weights(shift=zeros, scale=ones)
    return part
