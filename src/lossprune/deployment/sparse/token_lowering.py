"""From a traced network to steps on rows: norms, attention, constants, means over tokens.

What a step takes of the network itself, as a parameter that is added, is no value that it reads.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lossprune.channels.nodes import arguments, changed, read_call
from lossprune.channels.operations import Mean, Product, Sum
from lossprune.deployment.sparse.steps import ChannelScales, SparseOperation, SparseStep, Weights
from lossprune.deployment.sparse.token_steps import (
    RowNorm,
    TokenAttention,
    TokenMean,
    TokenPatches,
    TokenPick,
    TokenShift,
)

_LEAST = 1e-12  # an epsilon that keeps a norm's root away from 0
_ALL = slice(None, None, None)


def heads_attended(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, /, **numbers: Any
) -> Tensor:
    """Return softmax(scale · q kᵀ + bias) v of every head, (n, tokens, heads · value size).

    Queries, keys and values are (n, tokens, channels), and may be one tensor that holds all three;
    the bias is (n, tokens, 1), one number for each key.  The numbers are the fields of
    :class:`TokenAttention`; with ``first`` all tensors have their tokens first.

    >>> x = torch.randn(2, 5, 6)
    >>> heads_attended(x, x, x, heads=1, key_heads=1, size=2, value_size=2, query=0, key=2,
    ...     values=4, scale=1.0).shape
    torch.Size([2, 5, 2])
    """
    one = TokenAttention(**numbers)
    if one.first:
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        bias = None if bias is None else bias.transpose(0, 1)
    mixed = F.scaled_dot_product_attention(
        _of_heads(query, one.query, one.heads, one.size),
        _of_heads(key, one.key, one.key_heads, one.size),
        _of_heads(value, one.values, one.key_heads, one.value_size),
        None if bias is None else bias.transpose(1, 2)[:, None],
        is_causal=one.causal, scale=one.scale, enable_gqa=one.heads != one.key_heads,
    )  # fmt: skip
    mixed = mixed.transpose(1, 2).flatten(2)
    return mixed.transpose(0, 1) if one.first else mixed


def key_bias(mask: Tensor, *, left_out: bool, first: bool = False) -> Tensor:
    """Return the bias (n, keys, 1) of a mask of (n, keys) numbers, in whatever dimensions.

    Args:
        mask: float32, what is added to scores; or bool.
        left_out: whether True, of bool, is a key that is left out, or one that is not.
        first: whether tokens are at the first dimension of what is returned.

    >>> key_bias(torch.tensor([[False, True]]), left_out=True).flatten().tolist()
    [0.0, -inf]
    """
    if mask.dtype == torch.bool:
        out = mask if left_out else ~mask
        mask = torch.zeros(mask.shape).masked_fill_(out, -torch.inf)
    bias = mask.reshape(mask.shape[0], mask.shape[-1], 1)
    return bias.transpose(0, 1) if first else bias


def patch_rows(images: Tensor, *, size: tuple[int, int], leading: int = 0) -> Tensor:
    """Return the numbers of an image's patches, (n, leading + patches, channels · size).

    Args:
        images: (n, channels, height, width); what fills no patch at the lower right is left out.
        size: (vertical, horizontal) of a patch.
        leading: tokens of zeros that come first.

    >>> patch_rows(torch.arange(8.0).view(1, 1, 2, 4), size=(2, 2)).tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    rows = F.unfold(images, size, stride=size).transpose(1, 2)
    return F.pad(rows, (0, 0, leading, 0))


def _of_heads(whole: Tensor, first: int, heads: int, size: int) -> Tensor:
    own = whole[..., first : first + heads * size]
    return own.unflatten(-1, (heads, size)).transpose(1, 2)


def token_step(graph: fx.GraphModule, node: fx.Node) -> tuple[SparseStep, Weights] | None:
    """Return a node's step and weights, if it is one of those here.

    Args:
        graph: with the shapes of its values.
        node: of it.
    """
    for read in (_norm, _attention, _reduced, _shifted, _patches):
        found = read(graph, node)
        if found is not None:
            reads, operation, weights = found
            if any(_rank(one) is None for one in (*reads, node)):
                return None
            name = str(node.target) if node.op == "call_module" else node.name
            names = tuple(one.name for one in reads)
            return SparseStep(name, names, node.name, operation), weights
    return None


_Found = tuple[tuple[fx.Node, ...], SparseOperation, Weights]


def _rank(node: Any) -> int | None:
    """Return how many dimensions a float32 value has; None of others."""
    known: Any = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return len(known.shape) if getattr(known, "dtype", None) == torch.float32 else None


def constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """Return the parameter or buffer that a node is, where it is one in float32 on the CPU."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    usual = isinstance(value, Tensor) and value.dtype == torch.float32 and value.is_cpu
    return value.detach() if usual else None


def _norm(graph: fx.GraphModule, node: fx.Node) -> _Found | None:
    """Return a layer norm over the last dimension, or one by the root of the mean square."""
    given = _norm_of_module(graph, node) or _norm_called(graph, node)
    if given is None or not isinstance(node.args[0], fx.Node):
        return None
    centred, shape, epsilon, scale, shift = given
    if epsilon is None:
        epsilon = torch.finfo(torch.float32).eps
    shape = (shape,) if isinstance(shape, int) else shape
    plain = isinstance(shape, tuple | list) and len(shape) == 1 and type(shape[0]) is int
    if not plain or not isinstance(epsilon, float) or epsilon < _LEAST:
        return None
    features = shape[0]
    weights = Weights(
        scale=torch.ones(features) if scale is None else scale.detach().clone(),
        shift=torch.zeros(features) if shift is None else shift.detach().clone(),
    )
    if {weights.scale.dtype, weights.shift.dtype} != {torch.float32}:
        return None
    return (node.args[0],), RowNorm(features, epsilon, centred), weights


def _norm_of_module(graph: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    """Return whether it is centred, and the norm's shape, epsilon, scale and shift."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    norm = graph.get_submodule(str(node.target))
    if type(norm) not in (nn.LayerNorm, nn.RMSNorm) or changed(norm):
        return None
    bias = getattr(norm, "bias", None)
    return type(norm) is nn.LayerNorm, norm.normalized_shape, norm.eps, norm.weight, bias


def _norm_called(graph: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    if node.target not in (F.layer_norm, F.rms_norm) or not node.args:
        return None
    centred = node.target is F.layer_norm
    usual = {"normalized_shape": None, "weight": None, **({"bias": None} if centred else {})}
    given = arguments(node, {**usual, "eps": 1e-5 if centred else None})
    own: list[Tensor | None] = []
    for name in ("weight", "bias"):
        own.append(constant(graph, given.get(name)))
        if given.get(name) is not None and own[-1] is None:
            return None
    return centred, given["normalized_shape"], given["eps"], *own


def _attention(_: fx.GraphModule, node: fx.Node) -> _Found | None:
    if node.target is not heads_attended:
        return None
    reads: Any = tuple(node.args)
    numbers: Any = dict(node.kwargs)
    return reads, TokenAttention(**numbers), Weights()


def _reduced(_: fx.GraphModule, node: fx.Node) -> _Found | None:
    """Return the mean over tokens, or one of them: from three dimensions to two."""
    source: Any = node.args[0] if node.args else None
    if _rank(source) != 3 or _rank(node) != 2:
        return None
    place = _place(node)
    if place is not None:
        return (source,), TokenPick(place if place >= 0 else -1 - place, place < 0), Weights()
    read = read_call(node)
    if isinstance(read, Mean) and read.dimensions in ({1}, {-2}):
        return (source,), TokenMean(), Weights()
    return None


def _place(node: fx.Node) -> int | None:
    """Return k of x[:, k], if a node is that."""
    place: Any = None
    if node.target is operator.getitem and isinstance(node.args[1], tuple):
        first, place, *rest = (*node.args[1], None)
        if first != _ALL or rest not in ([None], [_ALL, None], [Ellipsis, None]):
            return None
    elif node.target in ("select", torch.select) and len(node.args) == 3 and node.args[1] == 1:
        place = node.args[2]
    return place if type(place) is int else None


def _shifted(graph: fx.GraphModule, node: fx.Node) -> _Found | None:
    """Return a sum with a parameter that all examples share, or a product with one of features."""
    read = read_call(node) if node.op in ("call_function", "call_method") else None
    if not isinstance(read, Sum | Product) or len(node.args) != 2 or node.kwargs:
        return None
    if isinstance(read, Sum) and read.sign != 1:
        return None
    found = [(one, constant(graph, two)) for one, two in (node.args, reversed(node.args))]
    source, own = next(((one, two) for one, two in found if two is not None), (None, None))
    rank = _rank(source)
    if own is None or rank not in (2, 3) or rank != _rank(node):
        return None
    assert isinstance(source, fx.Node)
    _, *tokens, features = source.meta["tensor_meta"].shape
    while own.dim() > 1 and len(own) == 1:
        own = own[0]
    if own.shape == (features,):
        ones, zeros = torch.ones(features), torch.zeros(features)
        scale, shift = (ones, own) if isinstance(read, Sum) else (own, zeros)
        weights = Weights(scale=scale.clone(), shift=shift.clone())
        return (source,), ChannelScales(features), weights
    if isinstance(read, Sum) and [*own.shape] == [*tokens, features]:
        return (source,), TokenShift(*own.shape), Weights(shift=own.t().reshape(-1).clone())
    return None


def _patches(_: fx.GraphModule, node: fx.Node) -> _Found | None:
    if node.target is not patch_rows:
        return None
    (image,) = node.args
    numbers: Any = dict(node.kwargs)
    if _rank(image) != 4:
        return None
    assert isinstance(image, fx.Node)
    operation = TokenPatches(*image.meta["tensor_meta"].shape[1:], **numbers)
    return (image,), operation, Weights()
