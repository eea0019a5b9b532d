"""Other ways to write what the kernels know, in a graph: reshapes by sizes, and copies of numbers.

``x.view(x.size(0), -1)`` is ``torch.flatten(x, 1)``, and sums and products do by themselves what
``expand_as`` does with a map of one position.
"""

import math
import operator
from typing import Any

import torch
from torch import fx

from lossprune.channels.nodes import is_shape, read_call
from lossprune.channels.operations import Product, Sum

SPREAD = (slice(None), slice(None), None, None)  # x[:, :, None, None]
_RESHAPES = (
    torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze,
    "reshape", "view", "flatten", "squeeze", "unsqueeze",
)  # fmt: skip
_EXPANSIONS = ("expand_as", "expand")


def simplify_(graph: fx.GraphModule) -> None:
    """Write what changes no numbers as the kernels know it.

    Args:
        graph: with the shapes of its values, as ``ShapeProp`` leaves them.
    """
    for node in list(graph.graph.nodes):
        if node.target is torch._assert and _of_rank(node.args[0]):
            erase_(graph.graph, node)
        elif node.target in _EXPANSIONS and _spreads(node):
            _replace_(graph, node, node.args[0])
        elif node.target in _RESHAPES and (found := _reshaped(node)):
            source, function, argument = found
            with graph.graph.inserting_before(node):
                simple = graph.graph.call_function(function, (source, argument))
            simple.meta = dict(node.meta)
            _replace_(graph, node, simple)
    for node in reversed(list(graph.graph.nodes)):
        if not node.users and (is_shape(node) or (node.args and _of_sizes(node))):
            graph.graph.erase_node(node)
    graph.recompile()


def _of_rank(condition: Any) -> bool:
    """Whether it is that a value has so many dimensions: the kernels look at that of their own."""
    if not isinstance(condition, fx.Node) or condition.target is not operator.eq:
        return False
    rank, count = condition.args
    if not isinstance(rank, fx.Node) or rank.target != "dim":
        return False
    shape = _shape(rank.args[0])
    return shape is not None and len(shape) == count


def _of_sizes(node: fx.Node) -> bool:
    return node.target is operator.getitem and is_shape(node.args[0])


def _reshaped(node: fx.Node) -> tuple[fx.Node, Any, Any] | None:
    """Return what a reshape is of, in how many steps ever, and the one function for it."""
    source, made = node, _shape(node)
    while made and source.target in _RESHAPES and source.args:
        source = source.args[0]
        one = _shape(source)
        if not isinstance(source, fx.Node) or one is None:
            return None
        if len(one) == 4 and made == (one[0], math.prod(one[1:])):
            return source, torch.flatten, 1
        if len(one) == 2 and made == (*one, 1, 1):
            return source, operator.getitem, SPREAD
    return None


def permutes(node: fx.Node) -> tuple[int, ...] | None:
    """Return the order of dimensions that a node gives a map."""
    if node.target not in (torch.permute, "permute") or node.kwargs:
        return None
    given: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
    plain = isinstance(given, tuple | list) and all(isinstance(one, int) for one in given)
    return tuple(one % 4 for one in given) if plain and len(given) == 4 else None


def erase_(graph: fx.Graph, node: fx.Node) -> None:
    """Take out a node, and what then nothing reads: here what led to it alone."""
    dead = [node]
    while dead:
        node = dead.pop()
        sources = node.all_input_nodes
        graph.erase_node(node)
        dead += [one for one in sources if not one.users and one.op != "placeholder"]


def _replace_(graph: fx.GraphModule, node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    erase_(graph.graph, node)


def _spreads(node: fx.Node) -> bool:
    """Whether a map of one position is made larger for sums and products with others alone."""
    source, made = node.args[0], _shape(node)
    one = _shape(source)
    if one is None or made is None or len(made) != 4 or one != (*made[:2], 1, 1):
        return False
    return all(
        user.op != "call_module"
        and isinstance(read_call(user), Sum | Product)
        and any(other is not node and _shape(other) == made for other in user.all_input_nodes)
        for user in node.users
    )


def _shape(node: Any) -> torch.Size | None:
    known: Any = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return getattr(known, "shape", None)
