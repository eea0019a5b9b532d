"""From a traced network to sparse steps: which operations the kernels know.

``lowered`` takes one node of a ``torch.fx`` graph whose shapes are known, and returns the step that
computes it, or nothing where torch must.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lossprune.channels.nodes import (
    Layer,
    changed,
    paddings,
    read_call,
    read_module,
    scale_and_shift,
)
from lossprune.channels.operations import (
    Concatenation,
    Mean,
    Operation,
    Pointwise,
    Pooling,
    Product,
    Sum,
)
from lossprune.deployment.sparse.forms import SPREAD, permutes
from lossprune.deployment.sparse.reading import activation_of, affine, both, windows_of
from lossprune.deployment.sparse.steps import (
    ChannelScales,
    MapActivation,
    MapJoin,
    MapProduct,
    MapSum,
    SparseConvolution,
    SparseOperation,
    SparseStep,
    Weights,
)
from lossprune.deployment.sparse.token_lowering import token_step
from lossprune.deployment.sparse.token_steps import OF_TOKENS, RowNorm

Lowered = tuple[SparseStep, Weights]

_FLATTENINGS = (nn.Flatten, torch.flatten, torch.reshape, "flatten", "view", "reshape", "squeeze")


def lowered(graph: fx.GraphModule, node: fx.Node) -> Lowered | str | None:
    """Return a node's step and weights; or the name of the value it leaves as it is; or None.

    Flattening and what does nothing in evaluation leave a value as it is.
    """
    return token_step(graph, node) or lowered_call(graph, node)


def lowered_call(
    graph: fx.GraphModule, node: fx.Node, taken: Callable[[torch.Size], Any] = lambda shape: shape
) -> Lowered | str | None:
    """Return what a node lowers to that is none of tokens, its values' shapes ``taken`` as said."""
    sources: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), sources.append)
    known = [_shape(value) for value in (*sources, node)]
    shapes = [shape and taken(shape) for shape in known]
    if not sources or None in shapes:
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
    if kind in _FLATTENINGS or kind is operator.getitem:
        return sources[0].name if len(sources) == 1 and _same_numbers(node, shapes) else None
    if _does_nothing(read, sources):
        return sources[0].name
    if isinstance(read, Sum | Product):
        if found := _with_parameter(graph, read, sources, shapes):
            value = next(source.name for source in sources if source.op != "get_attr")
            return SparseStep(name, (value,), node.name, found[0]), found[1]
        if shapes[0] != shapes[-1] and read != Sum(-1):
            sources, shapes = sources[::-1], [shapes[1], shapes[0], shapes[2]]
    reads = tuple(source.name for source in sources)
    found = _operation(read, shapes)
    return found and (SparseStep(name, reads, node.name, found[0]), found[1])


def _does_nothing(read: Operation | Layer | None, sources: Sequence[fx.Node]) -> bool:
    if isinstance(read, Concatenation):
        return len(sources) == 1
    return isinstance(read, Pointwise) and read.name in ("identity", "contiguous")


def _same_numbers(node: fx.Node, shapes: Sequence[torch.Size]) -> bool:
    """Whether an image becomes its numbers in a row, or features become maps of one position."""
    one, made = shapes
    if node.target is operator.getitem:
        return len(one) == 2 and node.args[1] == SPREAD
    return len(one) in (2, 4) and len(made) == 2 and one[0] == made[0]


def _with_parameter(
    graph: fx.GraphModule,
    read: Sum | Product,
    sources: Sequence[fx.Node],
    shapes: Sequence[torch.Size],
) -> tuple[SparseOperation, Weights] | None:
    """Return a sum or product with a parameter that has a number a channel, or one in all."""
    parameters = [source for source in sources if source.op == "get_attr"]
    if len(sources) != 2 or len(parameters) != 1 or len(shapes[-1]) not in (2, 4):
        return None
    place = sources.index(parameters[0])
    one, made, own = shapes[1 - place], shapes[-1], shapes[place]
    number = (made[1], *(1 for _ in made[2:]))
    if one != made or (math.prod(own) != 1 and own not in (number, (1, *number))):
        return None
    numbers = attribute(graph, str(parameters[0].target)).detach().reshape(-1).expand(made[1])
    if isinstance(read, Product):
        return scaled(numbers, torch.zeros(made[1]))
    sign = -1.0 if place == 0 and read.sign == -1 else 1.0
    shift = numbers if place == 0 else numbers * read.sign
    return scaled(torch.full((made[1],), sign), shift)


def attribute(module: nn.Module, path: str) -> Tensor:
    """Return a tensor of a module by its name."""
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


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
    if isinstance(step, str) and permutes(node):
        return False
    if isinstance(step, str):
        return None if rank == len(_shape(node.all_input_nodes[0])) else False
    match step[0].operation:
        case SparseConvolution(flat=True) | RowNorm():
            return None if rank == 2 else True
        case ChannelScales() if rank < 4:
            return None if rank == 2 else True
        case MapActivation() | MapSum(spread=False) | MapProduct(spread=False):
            return None
    return isinstance(step[0].operation, OF_TOKENS)


def _operation(
    read: Operation | Layer | None, shapes: Sequence[torch.Size]
) -> tuple[SparseOperation, Weights] | None:
    """Return the kernels' operation for what a node computes, given the shapes around it."""
    operation: SparseOperation | None = None
    match read, [len(shape) for shape in shapes]:
        case nn.Linear(weight=weight, bias=bias), [_, _]:
            outputs, inputs = weight.shape
            operation = SparseConvolution((outputs, inputs, 1, 1), flat=True)
            return operation, Weights.kept(weight, bias)
        case nn.Conv2d(weight=weight, bias=bias, padding_mode="zeros"), [4, 4]:
            (top, bottom), (left, right) = paddings(read)
            if (top, left) == (bottom, right):
                kernel: Any = tuple(weight.shape)
                stride, dilation = both(read.stride), both(read.dilation)
                operation = SparseConvolution(kernel, stride, (top, left), dilation, read.groups)
                return operation, Weights.kept(weight, bias)
        case (nn.BatchNorm1d() | nn.BatchNorm2d()) as norm, [2, 2] | [4, 4]:
            if found := scale_and_shift(norm):
                return scaled(*found)
        case Pointwise() as pointwise, [rank, _]:
            if by := affine(pointwise):
                channels = shapes[0][1 if rank == 4 else -1] if rank in (2, 3, 4) else 0
                return scaled(*(torch.full((channels,), one) for one in by)) if channels else None
            operation = activation_of(pointwise)
        case (Sum() | Product()) as meeting, [_, _, _]:
            operation = _of_two(meeting, shapes)
        case Concatenation(dimension=dimension), [first, *_] if first in (2, 4):
            operation = MapJoin() if dimension % first == 1 else None
        case (Pooling(dimensions=2) | Mean()) as pooling, [4, _]:
            operation = windows_of(pooling)
    return operation and (operation, Weights())


def scaled(scale: Tensor, shift: Tensor) -> tuple[SparseOperation, Weights]:
    """Return the step of one scale and shift a channel."""
    return ChannelScales(len(scale)), Weights(scale=scale.float(), shift=shift.float())


def _of_two(read: Sum | Product, shapes: Sequence[torch.Size]) -> SparseOperation | None:
    """Return a sum or product of maps of one shape, or where the second has a number a channel."""
    one, two, made = shapes
    spread = one != two
    if one != made or (spread and two != (*one[:2], 1, 1)):
        return None
    match read:
        case Sum(sign=sign):
            return MapSum(spread=spread, minus=sign == -1)
    return MapProduct(spread=spread)
