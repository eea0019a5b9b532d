"""Attention with what is around it: heads that are views of projected tokens, as one operation.

A network's code views (n, tokens, heads · size) as (n, heads, tokens, size), by itself for queries,
keys and values or for all three at once, calls attention, and views what comes out as (n, tokens,
heads · size) again.  Which numbers such views hold, their strides tell.
"""

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lossprune.channels.nodes import is_shape
from lossprune.deployment.opened import attended
from lossprune.deployment.sparse.forms import erase_
from lossprune.deployment.sparse.token_lowering import heads_attended, key_bias

_REGROUPING = ("view", "reshape", "unflatten", "flatten", "squeeze", "unsqueeze")
_SAME = ("contiguous", "clone")
_MOVING = ("transpose", "permute", "swapaxes", "movedim", "chunk", "split", "unbind", "select",
           "narrow", "getitem")  # fmt: skip
_SDPA = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
}  # fmt: skip
_ATTENTION = (F.scaled_dot_product_attention, attended, heads_attended)


@dataclass(frozen=True)
class _Fold:
    """Attention as it is to be written.

    Attributes:
        end: the node whose value ``heads_attended`` gives.
        tokens: queries, keys and values.
        mask: what there is of one, of a number for each example and key; and what True is in it.
        numbers: of ``heads_attended``.
    """

    end: fx.Node
    tokens: tuple[fx.Node, ...]
    mask: tuple[fx.Node, bool] | None
    numbers: dict[str, Any]


def fold_heads_(graph: fx.GraphModule) -> None:
    """Replace attention of heads that are views of tokens by ``heads_attended``.

    Masks of a number for each example and key become its bias; others are left as they are.

    Args:
        graph: with the shapes of its values, as ``ShapeProp`` leaves them.
    """
    biases: dict[tuple[fx.Node, bool, bool], fx.Node] = {}
    for node in list(graph.graph.nodes):
        read = {F.scaled_dot_product_attention: _folded, attended: _of_torch}.get(node.target)
        found = read(node) if read else None
        if found is None:
            continue
        reads = found.tokens
        if found.mask:
            key = (*found.mask, bool(found.numbers.get("first")))
            biases[key] = biases.get(key) or _bias(graph.graph, *key, found.tokens[1])
            reads = (*reads, biases[key])
        with graph.graph.inserting_before(found.end):
            made = graph.graph.call_function(heads_attended, reads, found.numbers)
        made.meta = dict(found.end.meta)
        found.end.replace_all_uses_with(made)
        erase_(graph.graph, found.end)
    graph.recompile()


def _bias(graph: fx.Graph, mask: fx.Node, left_out: bool, first: bool, like: fx.Node) -> fx.Node:
    """Return the bias of a mask, for keys such as ``like``.

    It is computed before all else where only inputs lead to it, so that no run is interrupted.
    """
    led = {mask}
    for node in reversed(graph.nodes):
        led.update(node.all_input_nodes if node in led else ())
    chain = [node for node in graph.nodes if node in led and node.op != "placeholder"]
    after = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    if all(node.op != "call_module" for node in chain):
        for node in chain:
            after.append(node)
            after = node
    else:
        after = mask
    with graph.inserting_after(after):
        made = graph.call_function(key_bias, (mask,), {"left_out": left_out, "first": first})
    n, keys = mask.meta["tensor_meta"].shape[0], mask.meta["tensor_meta"].shape[-1]
    shape = torch.Size((keys, n, 1) if first else (n, keys, 1))
    made.meta = {"tensor_meta": like.meta["tensor_meta"]._replace(shape=shape)}
    return made


def left_to_torch(network: nn.Module) -> list[str]:
    """Return a line that says why torch computes attention, where it does."""
    graphs = [part.graph for part in network.modules() if isinstance(part, fx.GraphModule)]
    found = [node for graph in graphs for node in graph.nodes if node.target in _ATTENTION]
    if not found:
        return []
    masked = any(_mask_of(node) is not None for node in found)
    why = (
        "its masks are no numbers of examples and keys"
        if masked
        else ("its heads are no views of one network's tokens, or it reads those of several")
    )
    return [f"attention is torch's in {len(found)} places, as {why}"]


def _mask_of(node: fx.Node) -> Any:
    given = [*node.args, *[None] * 7]
    place = {F.scaled_dot_product_attention: 3, attended: 6}.get(node.target, len(given) - 1)
    return node.kwargs.get("attn_mask", given[place])


def _folded(node: fx.Node) -> _Fold | None:
    """Return the last view of what attention gives, the tokens that it reads, and its numbers."""
    if len(node.args) < 3:
        return None
    given = {**_SDPA, **dict(zip(_SDPA, node.args[3:], strict=False)), **node.kwargs}
    heads = [_heads(one) for one in node.args[:3]]
    if given.keys() != _SDPA.keys() or given["dropout_p"] != 0 or None in heads:
        return None
    found: Any = heads
    (q, first, count, size), (k, second, fewer, _), (v, third, _, value_size) = found
    mask = None
    if given["attn_mask"] is not None:
        mask = _by_key(given["attn_mask"], 4, shape_of(k)[1], left_out=False)
        if mask is None:
            return None
    scale = 1 / math.sqrt(size) if given["scale"] is None else _number(given["scale"])
    end = _end(node, shape_of(q), count, value_size)
    if end is None or scale is None or not 0 < scale < math.inf:
        return None
    if type(given["is_causal"]) is not bool:
        return None
    numbers = {
        "heads": count, "key_heads": fewer, "size": size, "value_size": value_size,
        "query": first, "key": second, "values": third,
        "scale": float(scale), "causal": given["is_causal"],
    }  # fmt: skip
    return _Fold(end, (q, k, v), mask, numbers)


def _of_torch(node: fx.Node) -> _Fold | None:
    """Return the same of torch's own attention layer."""
    given: Any = node.args
    query, key, value, heads, batch_first, padding, mask, causal, need_weights, _ = given
    ends = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if set(ends) | {0, 1} != {0, 1} or 0 not in ends or (1 in ends and ends[1].users):
        return None
    shapes = [shape_of(one) for one in (query, key, value)]
    if any(len(shape) != 3 for shape in shapes):
        return None
    causal = causal is True and not need_weights and padding is None
    keys = shapes[1][1 if batch_first else 0]
    bias = None if padding is None else _by_key(padding, 2, keys, left_out=True)
    if not (mask is None or causal) or (padding is not None and bias is None):
        return None
    if 1 in ends:
        node.graph.erase_node(ends[1])
    size, value_size = shapes[0][2] // heads, shapes[2][2] // heads
    numbers = {
        "heads": heads, "key_heads": heads, "size": size, "value_size": value_size,
        "query": 0, "key": 0, "values": 0, "scale": 1 / math.sqrt(size), "causal": causal,
        "first": not batch_first,
    }  # fmt: skip
    return _Fold(ends[0], (query, key, value), bias, numbers)


def _by_key(mask: Any, rank: int, keys: int, *, left_out: bool) -> tuple[fx.Node, bool] | None:
    """Return a mask, if it has a number for each example and key and is the same for the rest."""
    known: Any = mask.meta.get("tensor_meta") if isinstance(mask, fx.Node) else None
    if getattr(known, "dtype", None) not in (torch.bool, torch.float32) or mask.op == "get_attr":
        return None
    shape = known.shape
    alike = len(shape) == rank and shape[-1] == keys and all(size == 1 for size in shape[1:-1])
    return (mask, left_out) if alike else None


def _heads(node: Any) -> tuple[fx.Node, int, int, int] | None:
    """Return tokens (n, t, channels), the first channel, heads and their size, of a view of them.

    None where it is no such view, (n, heads, t, size) with one head's channels after another's.
    """
    base, view = _viewed(node)
    if base is None or view is None or view.dim() != 4:
        return None
    n, t, channels = shape_of(base)
    _, heads, _, size = view.shape
    expected = (n, heads, t, size), (t * channels, size, channels, 1)
    first = int(view.storage_offset())
    if not strided(view, *expected) or n * t == 1 or first + heads * size > channels:
        return None
    return base, first, heads, size


def _end(node: fx.Node, tokens: tuple[int, ...], heads: int, size: int) -> fx.Node | None:
    """Return the view (n, t, heads · size) of what attention gives, if nothing reads another."""
    n, t, _ = tokens
    whole = n, t, heads * size
    view: Any = torch.empty(whole, device="meta").view(n, t, heads, size).transpose(1, 2)
    while len(node.users) == 1:
        (node,) = node.users
        view = applied(node, view)
        if not isinstance(view, Tensor):
            return None
        if strided(view, whole, (t * whole[2], whole[2], 1)):
            return node
    return None


def strided(view: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a view has these sizes and strides; those of one number may have any."""
    return view.shape == shape and all(
        size == 1 or own == stride
        for size, own, stride in zip(shape, view.stride(), strides, strict=True)
    )


def _viewed(node: Any) -> tuple[fx.Node | None, Any]:
    """Return the tokens that a node is a view of, and the view, without numbers."""
    if not isinstance(node, fx.Node):
        return None, None
    if _name(node) in (*_REGROUPING, *_SAME, *_MOVING) and node.args:
        base, view = _viewed(node.args[0])
        return base, None if view is None else applied(node, view)
    shape = shape_of(node)
    return (node, torch.empty(shape, device="meta")) if len(shape) == 3 else (None, None)


def applied(node: fx.Node, view: Any) -> Any:
    """Return what a node makes of a view, or None: no view of the same numbers."""
    name = _name(node)
    others: list[fx.Node] = []
    fx.map_arg((node.args[1:], node.kwargs), others.append)
    if name in _SAME:
        return view
    try:
        if name in _REGROUPING:
            return view.view(shape_of(node))
        if name in _MOVING and not others:
            function = operator.getitem if name == "getitem" else getattr(Tensor, name)
            return function(view, *node.args[1:], **node.kwargs)
    except (RuntimeError, TypeError, IndexError):  # what torch raises where there is no such view
        return None
    return None


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    known = node.target in (operator.getitem, getattr(torch, name, None))
    return name if known else ""


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a float32 value; () of others."""
    known: Any = node.meta.get("tensor_meta")
    return tuple(known.shape) if getattr(known, "dtype", None) == torch.float32 else ()


def _number(value: Any) -> float | None:
    """Return a number that is the same in all calls: of numbers, and the last size of a tensor."""
    if isinstance(value, int | float):
        return value
    if not isinstance(value, fx.Node):
        return None
    if value.target in (operator.pow, operator.mul, operator.truediv, math.sqrt):
        numbers = [_number(one) for one in value.args]
        function: Any = value.target
        return None if None in numbers or value.kwargs else function(*numbers)
    tensor, place = _size_of(value)
    shape = shape_of(tensor) if isinstance(tensor, fx.Node) else ()
    return shape[-1] if shape and place in (-1, len(shape) - 1) else None


def _size_of(node: fx.Node) -> tuple[Any, Any]:
    """Return x and k where a node is x.size(k), x.size()[k] or x.shape[k]."""
    if node.target == "size" and len(node.args) == 2:
        return node.args
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and is_shape(source):
        assert isinstance(source, fx.Node)
        return source.args[0], node.args[1]
    return None, None
