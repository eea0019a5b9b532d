"""Images in patches as the tokens of vision transformers: a linear layer of each patch's numbers.

A convolution whose stride is its kernel, seen as (n, patches, channels), is that layer; and a token
that is put before all patches, as the one of the class is, is a patch of zeros plus a constant.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from lossprune.channels.nodes import changed, is_shape, paddings
from lossprune.deployment.heads import applied, shape_of, strided
from lossprune.deployment.sparse.forms import erase_
from lossprune.deployment.sparse.token_lowering import constant, patch_rows


def fold_patches_(graph: fx.GraphModule) -> None:
    """Write such convolutions as ``patch_rows`` and a linear layer of the same name.

    Args:
        graph: with the shapes of its values, as ``ShapeProp`` leaves them.
    """
    for node in list(graph.graph.nodes):
        convolution = _convolution(graph, node)
        end = convolution and _end(node)
        if convolution is None or end is None:
            continue
        leading = _leading(graph, end)
        last, tokens = leading or (end, None)
        _replace_(graph, node, convolution, end, last, tokens)
    graph.recompile()


def _replace_(
    graph: fx.GraphModule,
    node: fx.Node,
    convolution: nn.Conv2d,
    patches: fx.Node,
    end: fx.Node,
    leading: Tensor | None,
) -> None:
    """Let ``end`` be computed from the input of the convolution.

    Its ``patches`` are that, or what ``leading`` tokens, (tokens, width), are put before.
    """
    count = 0 if leading is None else len(leading)
    size = tuple(convolution.kernel_size)
    image: Any = node.args[0]
    layer, path = _linear(convolution), str(node.target)
    parent, _, name = path.rpartition(".")
    graph.get_submodule(parent)._modules[name] = layer
    n, tokens, width = shape_of(end)
    meta: Any = end.meta["tensor_meta"]
    with graph.graph.inserting_before(end):
        rows = graph.graph.call_function(patch_rows, (image,), {"size": size, "leading": count})
        made = graph.graph.call_module(path, (rows,))
        rows.meta["tensor_meta"] = meta._replace(shape=torch.Size((n, tokens, layer.in_features)))
        made.meta["tensor_meta"] = meta
        if leading is not None:
            shift = torch.zeros(tokens, width)
            shift[:count] = leading if layer.bias is None else leading - layer.bias
            shifts = f"{path.replace('.', '_')}_leading"
            graph.register_buffer(shifts, shift)
            added = graph.graph.get_attr(shifts)
            added.meta["tensor_meta"] = meta._replace(shape=shift.shape)
            made = graph.graph.call_function(operator.add, (made, added))
            made.meta["tensor_meta"] = meta
    for source in (node, patches):
        for counting in filter(_counts, list(source.users)):
            counting.replace_input_with(source, image)
    end.replace_all_uses_with(made)
    erase_(graph.graph, end)


def _convolution(graph: fx.GraphModule, node: fx.Node) -> nn.Conv2d | None:
    """Return the convolution of patches that a node calls, where no other does."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or len(shape_of(node)) != 4:
        return None
    layer = graph.get_submodule(str(node.target))
    if type(layer) is not nn.Conv2d or changed(layer) or layer.weight.dtype != torch.float32:
        return None
    apart = layer.stride == layer.kernel_size and layer.dilation == (1, 1) and layer.groups == 1
    unpadded = not any(map(any, paddings(layer)))
    calls = [other for other in graph.graph.nodes if other.target == node.target]
    return layer if apart and unpadded and len(calls) == 1 else None


def _end(node: fx.Node) -> fx.Node | None:
    """Return the view (n, patches, channels) of a map, if nothing reads another."""
    n, channels, height, width = shape_of(node)
    count = height * width
    view: Any = torch.empty(shape_of(node), device="meta")
    while count > 1 and (found := _only_view(node)):
        node = found
        view = applied(node, view)
        if not isinstance(view, Tensor):
            return None
        if strided(view, (n, count, channels), (channels * count, 1, count)):
            return node
    return None


def _only_view(node: fx.Node) -> fx.Node | None:
    """Return what alone reads a value's numbers; of its sizes, it reads all but how many it has."""
    views = [user for user in node.users if not _is_size(user)]
    if len(views) != 1:
        return None
    for size in node.users:
        if size is views[0] or _counts(size):
            continue
        parts = [size] if not is_shape(size) else [*size.users]
        if any(reader is not views[0] for part in parts for reader in part.users):
            return None
    return views[0]


def _leading(graph: fx.GraphModule, patches: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """Return what joins a parameter's tokens and the patches, in this order, and the tokens."""
    users = [user for user in patches.users if not _counts(user)]
    if len(users) != 1:
        return None
    (node,) = users
    given: Any = (*node.args, node.kwargs.get("dim"), None)
    joined = node.target in (torch.cat, torch.concat) and given[1] in (1, -2)
    if not joined or not isinstance(given[0], list | tuple) or len(given[0]) != 2:
        return None
    before, after = given[0]
    if after is not patches or before.target not in ("expand", "repeat"):
        return None
    tokens = constant(graph, before.args[0])
    _, count, width = shape_of(before)
    if tokens is None or tokens.shape != (1, count, width):
        return None
    return node, tokens[0]


def _is_size(node: fx.Node) -> bool:
    return is_shape(node) or node.target == "size"


def _counts(node: fx.Node) -> bool:
    """Whether a node is how many examples there are, or all sizes of which that alone is read."""
    if is_shape(node):
        return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    return node.target == "size" and node.args[1:] == (0,)


def _linear(convolution: nn.Conv2d) -> nn.Linear:
    """Return the layer of a patch's numbers, which shares no parameter with the convolution."""
    weight = convolution.weight.detach().flatten(1)
    bias = convolution.bias
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made.eval()
