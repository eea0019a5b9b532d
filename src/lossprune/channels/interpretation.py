"""Which operation a node of the graph is, where that is known."""

import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lossprune.channels.layers import layer_operation, norm_operation
from lossprune.channels.nodes import BatchNorm, Convolution, is_shape, read_call, read_module
from lossprune.channels.operations import Flatten, Operation

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
        operation = Flatten() if _flattens(node, known) else read_call(node)
        return operation or f"channels are not followed through the method {node.target!r}"
    if node.op == "call_function":
        called = getattr(node.target, "__name__", str(node.target))
        return read_call(node) or f"channels are not followed through the function {called!r}"
    return f"it depends on the network's attribute {node.target!r}"


def size_query(node: fx.Node) -> bool:
    """Whether ``node`` asks a tensor for the size of its first dimension alone, or leads to it."""
    if _first_size(node):
        return True
    return is_shape(node) and not node.kwargs and all(map(_first_size, node.users))


def _first_size(node: fx.Node) -> bool:
    """x.size(0), x.shape[0] or x.size()[0]."""
    if node.op == "call_method" and node.target == "size":
        return tuple(node.args[1:]) == (0,)
    return bool(node.target is operator.getitem and node.args[1] == 0 and is_shape(node.args[0]))


def _module(
    name: str, module: nn.Module, node: fx.Node, mask: Mapping[str, Tensor]
) -> Operation | str:
    kind = type(module)
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return f"channels are not followed through {kind.__name__} with several arguments"
    for tensor in (*module.parameters(), *module.buffers()):
        # Constants are followed as real numbers; an integer buffer counts batches.
        if tensor.dtype not in _REAL and not (tensor.dim() == 0 and tensor.dtype == torch.int64):
            return f"its numbers are {str(tensor.dtype).removeprefix('torch.')}"
    operation = read_module(module)
    if isinstance(operation, BatchNorm):
        return norm_operation(name, operation) or "it keeps no running statistics"
    if isinstance(operation, nn.Linear | Convolution):
        kept = mask.get(f"{name}.weight")
        kept = torch.ones_like(operation.weight, dtype=torch.bool) if kept is None else kept
        return layer_operation(name, operation, kept) or "its channels are in groups"
    return operation or f"channels are not followed through {kind.__name__}"


def _flattens(node: fx.Node, known: Container[fx.Node]) -> bool:
    """x.view(n, -1) with n the size of x's first dimension, there or before known operations."""
    if node.target not in ("view", "reshape") or node.kwargs:
        return False
    given: Any = node.args
    sizes = given[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        (sizes,) = sizes
    if len(sizes) != 2 or sizes[1] != -1 or not isinstance(sizes[0], fx.Node):
        return False
    if not _first_size(sizes[0]):
        return False
    source: Any = sizes[0].args[0]
    if sizes[0].target is operator.getitem:
        source = source.args[0]
    return _derived(given[0], source, known)


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
