"""Maps whose channels a network moves to the end, for layer norm and linear layers, and back.

Between ``x.permute(0, 2, 3, 1)`` and ``x.permute(0, 3, 1, 2)`` a linear layer is a convolution of
one position, and a layer norm is one over channels: the kernels leave the map where it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lossprune.channels.nodes import in_place
from lossprune.deployment.sparse.forms import permutes
from lossprune.deployment.sparse.lowering import Lowered, lowered_call
from lossprune.deployment.sparse.steps import (
    ChannelScales,
    MapActivation,
    MapNorm,
    MapProduct,
    MapSum,
    SparseConvolution,
)
from lossprune.deployment.sparse.token_lowering import token_step
from lossprune.deployment.sparse.token_steps import RowNorm

_THERE, _BACK = (0, 2, 3, 1), (0, 3, 1, 2)
_ELEMENTWISE = ChannelScales | MapActivation | MapSum | MapProduct


def moved_channels(graph: fx.GraphModule) -> list[dict[str, Lowered | str]]:
    """Return what nodes lower to between two such moves, those of each first move together.

    There are none of moves between which something else happens, or without a way back.
    """
    groups = []
    for node in graph.graph.nodes:
        if permutes(node) == _THERE and (found := _group(graph, node)):
            groups.append(found)
    return groups


def _group(graph: fx.GraphModule, first: fx.Node) -> dict[str, Lowered | str] | None:
    found: dict[str, Lowered | str] = {first.name: first.all_input_nodes[0].name}
    inside = {first}
    for node in graph.graph.nodes:
        sources = [source for source in node.all_input_nodes if source in inside]
        if not sources or node is first:
            continue
        if permutes(node) == _BACK:
            found[node.name] = sources[0].name
            continue
        step = _step(graph, node)
        others = {*node.all_input_nodes} - inside
        if step is None or in_place(graph, node) or any(one.op != "get_attr" for one in others):
            return None
        found[node.name] = step
        inside.add(node)
    return found


def _step(graph: fx.GraphModule, node: fx.Node) -> Lowered | str | None:
    norm = token_step(graph, node)
    if norm and isinstance(row := norm[0].operation, RowNorm):
        operation = MapNorm(row.features, row.epsilon, row.centred)
        return replace(norm[0], operation=operation), norm[1]
    found = lowered_call(graph, node, _first)
    if found is None or isinstance(found, str):
        return found
    step, weights = found
    match step.operation:
        case SparseConvolution(flat=True) as linear:
            return replace(step, operation=replace(linear, flat=False)), weights
    known = isinstance(step.operation, _ELEMENTWISE)
    return found if known and not getattr(step.operation, "spread", False) else None


def _first(shape: Sequence[int]) -> Any:
    """Return a shape as it is with the channels moved to where they were."""
    if len(shape) == 4:
        return torch.Size((shape[0], shape[3], *shape[1:3]))
    return torch.Size((*shape, 1, 1)) if len(shape) == 1 else None
