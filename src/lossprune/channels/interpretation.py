"""Which operation a node of the graph is, where that is known."""

import copy
import operator
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lossprune.channels.kinds import (
    ARITHMETIC,
    BY_A_NUMBER,
    DROPOUTS,
    POINTWISE_HOMES,
    POINTWISE_MODULES,
    POINTWISE_NAMES,
    POOL_FUNCTIONS,
    POOL_MODULES,
)
from lossprune.channels.layers import BatchNorm, layer_operation, norm_operation
from lossprune.channels.operations import (
    Concatenation,
    Flatten,
    Mean,
    Operation,
    Pointwise,
    Pooling,
)
from lossprune.pruning.prunable import LAYERS

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def interpret(
    model: nn.Module,
    node: fx.Node,
    mask: Mapping[str, Tensor],
    locked: Mapping[str, str],
    known: Container[fx.Node],
) -> Operation | str:
    """Return the operation of ``node``, or why its effect on channels is not known.

    ``mask`` says which weights are kept; ``locked`` why a module must keep its size; ``known`` are
    the nodes before whose operations are known.
    """
    if node.op == "call_module":
        name = str(node.target)
        if name in locked:
            return locked[name]
        return _module(name, model.get_submodule(name), node, mask)
    if node.op == "call_method":
        return _method(str(node.target), node, known) or f"the method {node.target!r} is not traced"
    if node.op == "call_function":
        called = getattr(node.target, "__name__", str(node.target))
        return _function(node) or f"the function {called!r} is not traced"
    return f"it depends on the network's attribute {node.target!r}"


def size_query(node: fx.Node) -> bool:
    """Whether ``node`` asks a tensor for the size of its first dimension alone, or leads to it."""
    if _first_size(node):
        return True
    shape = node.op == "call_method" and node.target == "size" and len(node.args) == 1
    shape = shape or (node.target is getattr and node.args[1:2] == ("shape",))
    return shape and not node.kwargs and all(map(_first_size, node.users))


def _first_size(node: fx.Node) -> bool:
    """x.size(0), x.shape[0] or x.size()[0]."""
    if node.op == "call_method" and node.target == "size":
        return tuple(node.args[1:]) == (0,)
    return bool(node.target is operator.getitem and node.args[1] == 0 and _is_shape(node.args[0]))


def _is_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.op == "call_method" and node.target == "size" and len(node.args) == 1


def _module(
    name: str, module: nn.Module, node: fx.Node, mask: Mapping[str, Tensor]
) -> Operation | str:
    kind = type(module)
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return f"{kind.__name__} with other arguments than a tensor is not traced"
    for tensor in (*module.parameters(), *module.buffers()):
        # Constants are followed as real numbers; an integer buffer counts batches.
        if tensor.dtype not in _REAL and not (tensor.dim() == 0 and tensor.dtype == torch.int64):
            return f"its numbers are {str(tensor.dtype).removeprefix('torch.')}"
    operation: Operation | None = None
    if kind in LAYERS and isinstance(module, LAYERS):
        kept = mask.get(f"{name}.weight")
        kept = torch.ones_like(module.weight, dtype=torch.bool) if kept is None else kept
        operation = layer_operation(name, module, kept)
        return operation or "its channels are in groups"
    if isinstance(module, BatchNorm) and kind in BatchNorm.__args__:
        return norm_operation(name, module) or "it keeps no running statistics"
    if kind in POINTWISE_MODULES:
        operation = Pointwise(copy.deepcopy(module).eval())
    elif kind in POOL_MODULES:
        zeros = _zeros(getattr(module, "padding", 0), getattr(module, "count_include_pad", False))
        zeros = zeros or getattr(module, "divisor_override", None) is not None
        if not getattr(module, "return_indices", False):
            operation = Pooling(POOL_MODULES[kind], zeros)
    elif kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        operation = Flatten()
    return operation or f"{kind.__name__} is not traced"


def _zeros(padding: Any, counted: bool) -> bool:
    """Whether a mean counts the zeros that it pads with."""
    return counted and (padding != 0 if isinstance(padding, int) else any(padding))


def _method(name: str, node: fx.Node, known: Container[fx.Node]) -> Operation | None:
    if name in ("view", "reshape"):
        return Flatten() if _flattens(node.args, known) and not node.kwargs else None
    if name == "flatten":
        return _flatten(node)
    if name == "mean":
        return _mean(node)
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if name in ARITHMETIC or name in BY_A_NUMBER:
        return _arithmetic(name, node, lambda *given: getattr(given[0], name)(*given[1:]))
    if name in POINTWISE_NAMES and len(tensors) == 1 and not _nodes(node.kwargs):
        return Pointwise(lambda c: getattr(c, name)(*node.args[1:], **node.kwargs))
    return None


def _function(node: fx.Node) -> Operation | None:
    function: Any = node.target
    name = getattr(function, "__name__", "")
    read = _readers().get(function)
    if read is not None:
        return read(node)
    homes = (getattr(operator, name, None), getattr(torch, name, None))
    if (name in ARITHMETIC or name in BY_A_NUMBER) and function in homes:
        return _arithmetic(name, node, function)
    known = any(getattr(home, name, None) is function for home in POINTWISE_HOMES)
    known = (known and name in POINTWISE_NAMES) or function in (operator.neg, operator.abs)
    if not known or _nodes(node.args[1:]) or _nodes(node.kwargs):
        return None
    return Pointwise(lambda c: function(c, *node.args[1:], **node.kwargs))


def _readers() -> dict[Any, Callable[[fx.Node], Operation | None]]:
    """The functions that need a closer look at their arguments."""
    return {
        **dict.fromkeys(POOL_FUNCTIONS, _pooling),
        **dict.fromkeys(DROPOUTS, _dropout),
        **dict.fromkeys((torch.cat, torch.concat), _concatenation),
        torch.flatten: _flatten,
        torch.mean: _mean,
    }


def _dropout(node: fx.Node) -> Operation | None:
    off = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is False
    return Pointwise(lambda c: c) if off else None


def _arithmetic(name: str, node: fx.Node, plain: Any) -> Operation | None:
    if node.kwargs or len(node.args) != 2:
        return None
    if all(isinstance(argument, fx.Node) for argument in node.args):
        return ARITHMETIC.get(name)
    if not all(isinstance(argument, fx.Node | int | float) for argument in node.args):
        return None
    return Pointwise(
        lambda c: plain(*(c if isinstance(given, fx.Node) else given for given in node.args))
    )


def _pooling(node: fx.Node) -> Operation | None:
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("return_indices") or _nodes(node.args[1:]):
        return None
    function: Any = node.target
    averages = any(function is getattr(F, f"avg_pool{d}d") for d in (1, 2, 3))
    zeros = averages and (
        _zeros(given.get("padding", 0), bool(given.get("count_include_pad", True)))
        or len(node.args) > len(names)
        or given.get("divisor_override") is not None
    )
    return Pooling(POOL_FUNCTIONS[function], zeros)


def _flatten(node: fx.Node) -> Operation | None:
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    whole = (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1)
    return Flatten() if whole else None


def _flattens(arguments: Any, known: Container[fx.Node]) -> bool:
    """x.view(n, -1) with n the size of x's first dimension, there or before known operations."""
    sizes = arguments[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        (sizes,) = sizes
    if len(sizes) != 2 or sizes[1] != -1 or not isinstance(sizes[0], fx.Node):
        return False
    if not _first_size(sizes[0]):
        return False
    source: Any = sizes[0].args[0]
    if sizes[0].target is operator.getitem:
        source = source.args[0]
    return _derived(arguments[0], source, known)


def _derived(node: fx.Node, source: fx.Node, known: Container[fx.Node]) -> bool:
    """Whether ``node`` comes from ``source`` by known operations, which keep the batch."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is source:
            return True
        if node in known and node not in seen:
            seen.add(node)
            waiting.extend(node.all_input_nodes)
    return False


def _mean(node: fx.Node) -> Operation | None:
    given: dict[str, Any] = dict(zip(("dim", "keepdim"), node.args[1:], strict=False))
    given |= node.kwargs
    dimensions = given.pop("dim", None)
    keep = given.pop("keepdim", False)
    if given or dimensions is None or _nodes(dimensions):
        return None
    dimensions = (dimensions,) if isinstance(dimensions, int) else dimensions
    return Mean(frozenset(dimensions), keep)


def _concatenation(node: fx.Node) -> Operation | None:
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | dict(node.kwargs)
    dimension = given.get("dim", 0)
    if not isinstance(given.get("tensors"), tuple | list) or not isinstance(dimension, int):
        return None
    return Concatenation(dimension)


def _nodes(arguments: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return bool(found)
