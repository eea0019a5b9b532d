"""What a node of a network's graph hands to the function that it calls."""

from collections.abc import Mapping
from typing import Any

from torch import fx


def arguments(node: fx.Node, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``node`` after its tensor, by the names and with the defaults given.

    What is given by another name is there by that name, and what is given after all these by none.
    """
    return {**usual, **dict(zip(usual, node.args[1:], strict=False)), **node.kwargs}


def has_nodes(values: Any) -> bool:
    """Whether there are values of the graph among these, or in containers among them."""
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)
    return bool(found)
