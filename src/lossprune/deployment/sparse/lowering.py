"""From a traced network to sparse steps: which operations the kernels know, and which they join.

``lowered`` takes one node of a ``torch.fx`` graph whose shapes are known, and returns the step that
computes it, or nothing where torch must.  ``joined`` then puts what follows a convolution into it:
batch norm into its weights, an addition, an activation and a maximum over 2×2 into its end.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lossprune.channels.nodes import (
    Layer,
    changed,
    paddings,
    read_call,
    read_module,
    scale_and_shift,
)
from lossprune.channels.operations import Operation, Pointwise, Pooling, Sum
from lossprune.deployment.sparse.steps import (
    ChannelScales,
    MapActivation,
    MapMaximum,
    MapMean,
    MapSum,
    Pair,
    SparseConvolution,
    SparseOperation,
    SparseStep,
    Weights,
)
from lossprune.kernels.interface import Activation

Lowered = tuple[SparseStep, Weights]

# The maximum of these is theirs of the maximum.
_INCREASING = (Activation.IDENTITY, Activation.RELU, Activation.TANH)
_FLATTENINGS = (nn.Flatten, torch.flatten, torch.reshape, "flatten", "view", "reshape")


def lowered(graph: fx.GraphModule, node: fx.Node) -> Lowered | str | None:
    """Return a node's step and weights; or the name of the value it leaves as it is; or None.

    Flattening and what does nothing in evaluation leave a value as it is.
    """
    reads = tuple(source.name for source in node.all_input_nodes)
    shapes = [_shape(value) for value in (*node.all_input_nodes, node)]
    if not reads or None in shapes:
        return None
    name, kind = node.name, node.target
    read: Operation | Layer | None
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if module.training or changed(module) or len(node.args) + len(node.kwargs) != 1:
            return None
        name, kind, read = str(node.target), type(module), read_module(module)
    else:
        read = read_call(node)
    if kind in _FLATTENINGS:
        one, *_, made = shapes
        whole = len(one) in (2, 4) and len(made) == 2 and one[0] == made[0]
        return reads[0] if len(reads) == 1 and whole else None
    if isinstance(read, Pointwise) and read.name == "identity":
        return reads[0]
    found = _operation(read, shapes)
    return found and (SparseStep(name, reads, node.name, found[0]), found[1])


def _shape(node: fx.Node) -> Any:
    """Return the shape of a float32 value of one dimension or more; None of others."""
    known: Any = node.meta.get("tensor_meta")
    usual = getattr(known, "dtype", None) == torch.float32 and len(known.shape) >= 1
    return known.shape if usual else None


def of_rows(node: fx.Node, step: Lowered | str) -> bool | None:
    """Return whether a node needs rows of features, or images; None: it does with either.

    To a linear layer all that is before the last dimension is rows: positions of tokens as well as
    examples.  What else the kernels know has the channels at the second dimension.
    """
    rank = len(_shape(node))
    if isinstance(step, str):
        return None if rank == len(_shape(node.all_input_nodes[0])) else False
    match step[0].operation:
        case SparseConvolution(flat=True):
            return None if rank == 2 else True
        case MapActivation() | MapSum():
            return None
    return False


def _operation(
    read: Operation | Layer | None, shapes: Sequence[torch.Size]
) -> tuple[SparseOperation, Weights] | None:
    """Return the kernels' operation for what a node computes, given the shapes around it."""
    operation: SparseOperation | None = None
    weights = Weights()
    match read, [len(shape) for shape in shapes]:
        case nn.Linear(weight=weight, bias=bias), [_, _]:
            outputs, inputs = weight.shape
            operation = SparseConvolution((outputs, inputs, 1, 1), flat=True)
            weights = Weights.kept(weight, bias)
        case nn.Conv2d(weight=weight, bias=bias, padding_mode="zeros"), [4, 4]:
            (top, bottom), (left, right) = paddings(read)
            if (top, left) == (bottom, right):
                kernel: Any = tuple(weight.shape)
                stride, dilation = _pair(read.stride), _pair(read.dilation)
                operation = SparseConvolution(kernel, stride, (top, left), dilation, read.groups)
                weights = Weights.kept(weight, bias)
        case (nn.BatchNorm1d() | nn.BatchNorm2d()) as norm, [2, 2] | [4, 4]:
            if found := scale_and_shift(norm):
                operation = ChannelScales(norm.num_features)
                weights = Weights(scale=found[0].float(), shift=found[1].float())
        case Pointwise(name=name), [_, _] if name.upper() in Activation.__members__:
            operation = MapActivation(Activation[name.upper()])
        case Sum(sign=1), [_, _, _] if shapes[0] == shapes[1]:
            operation = MapSum()
        case Pooling(kind="max", dimensions=2, arguments=given), [4, 4]:
            size, padding, dilation = (
                _pair(given[name]) for name in ("kernel_size", "padding", "dilation")
            )
            if (padding, dilation, bool(given["ceil_mode"])) == ((0, 0), (1, 1), False):
                operation = MapMaximum(size, _pair(given["stride"] or size))
        case Pooling(kind="adaptive_avg", dimensions=2, arguments=given), [4, 4]:
            if given["output_size"] in (1, (1, 1), [1, 1]):
                operation = MapMean()
    return operation and (operation, weights)


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else tuple(value)


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
            | MapSum(activation=Activation.IDENTITY) as before,
            MapActivation(activation=activation),
        ):
            operation = replace(before, activation=activation)
        case (
            SparseConvolution(activation=Activation.IDENTITY, pool=1) as before,
            ChannelScales(),
        ) if len(reads) == 1:
            weights = _scaled(weights, more, before)
        case SparseConvolution(activation=Activation.IDENTITY, pool=1), MapSum() if len(reads) == 1:
            reads = (*reads, *(name for name in after.reads if name != through))
        # No tile of the kernels has two columns at strides beyond 2.
        case (
            SparseConvolution(pool=1, stride=(_, 1 | 2)) as before,
            MapMaximum(size=(2, 2), stride=(2, 2)),
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
        case MapActivation(activation=activation):
            scales = ChannelScales(channels, activation)
            ones, zeros = torch.ones(channels), torch.zeros(channels)
            return replace(part[0], operation=scales), Weights(shift=zeros, scale=ones)
    return part
