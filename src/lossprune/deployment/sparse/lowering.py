"""From a traced network to sparse steps: which operations the kernels know, and which they join.

``lowered`` reads a ``torch.fx`` graph whose shapes are known and returns, node by node, the step
that computes it, or nothing where torch must.  ``joined`` then puts what follows a convolution into
it: batch norm into its weights, an addition, an activation and a maximum over 2×2 into its end.
"""

import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from lossprune.deployment.sparse.steps import (
    ChannelScales,
    MapActivation,
    MapMaximum,
    MapMean,
    MapSum,
    SparseConvolution,
    SparseOperation,
    SparseStep,
    Weights,
)
from lossprune.kernels.interface import Activation

Lowered = tuple[SparseStep, Weights]

_ACTIVATIONS: Mapping[Any, Activation] = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, "relu"), Activation.RELU),
    **dict.fromkeys((nn.Tanh, F.tanh, torch.tanh, "tanh"), Activation.TANH),
}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add")
_FLATTENINGS = (torch.flatten, torch.reshape, "flatten", "view", "reshape")
_POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")

# An operation and its weights; "same" of what leaves a value as it is; None where torch must.
_Read = tuple[SparseOperation, Weights] | Literal["same"] | None


def lowered(graph: fx.GraphModule, node: fx.Node) -> Lowered | str | None:
    """Return a node's step and weights; or the name of the value it leaves as it is; or None.

    Flattening and what does nothing in evaluation leave a value as it is.
    """
    shape = _shape(node)
    before = _shape(node.all_input_nodes[0]) if node.all_input_nodes else None
    if shape is None or before is None:
        return None
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        given = len(node.args) + len(node.kwargs)
        if module.training or own or len(node.all_input_nodes) != 1 or given != 1:
            return None
        name, read = str(node.target), _module(module, before, shape)
    else:
        name, read = node.name, _function(node, before, shape)
    sources = tuple(source.name for source in node.all_input_nodes)
    if read is None or read == "same":
        return read and sources[0]
    return SparseStep(name, sources, node.name, read[0]), read[1]


def _module(module: nn.Module, before: torch.Size, after: torch.Size) -> _Read:
    read: Callable[..., _Read] | None = {
        nn.Linear: _linear,
        nn.Conv2d: _convolution,
        nn.BatchNorm1d: _batch_norm,
        nn.BatchNorm2d: _batch_norm,
        nn.MaxPool2d: _max_pool,
        nn.AdaptiveAvgPool2d: _mean,
    }.get(type(module))
    if read is not None:
        return read(module, before)
    if type(module) in _ACTIVATIONS and _is_map(before):
        return MapActivation(_ACTIVATIONS[type(module)]), Weights()
    same = isinstance(module, _NOTHING) and _is_map(before)
    same = same or (isinstance(module, nn.Flatten) and _flattens(before, after))
    return "same" if same else None


def _function(  # noqa: PLR0911, one return for each kind
    node: fx.Node, before: torch.Size, after: torch.Size
) -> _Read:
    inputs = node.all_input_nodes
    if not _is_map(before):
        return None
    if node.target in _ADDITIONS:
        alike = len(inputs) == 2 and _shape(inputs[1]) == before and set(node.args) == set(inputs)
        return (MapSum(), Weights()) if alike and not node.kwargs else None
    if len(inputs) != 1:
        return None
    if node.target in _ACTIVATIONS:
        return MapActivation(_ACTIVATIONS[node.target]), Weights()
    if node.target in _FLATTENINGS:
        return "same" if _flattens(before, after) else None
    if node.target is F.adaptive_avg_pool2d and len(after) == 4 and after[2:] == (1, 1):
        return MapMean(), Weights()
    if node.target is F.max_pool2d:
        given = {**dict(zip(_POOLING, node.args[1:], strict=False)), **node.kwargs}
        given.pop("input", None)
        return _max_pool(nn.MaxPool2d(**given), before)  # type: ignore[arg-type]
    return None


def _linear(module: nn.Linear, before: torch.Size) -> _Read:
    if len(before) != 2:
        return None
    outputs, inputs = module.weight.shape
    convolution = SparseConvolution((outputs, inputs, 1, 1), flat=True)
    return convolution, Weights.kept(module.weight, module.bias)


def _convolution(module: nn.Conv2d, before: torch.Size) -> _Read:
    if len(before) != 4 or module.padding_mode != "zeros":
        return None
    padding: Any = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(extent % 2 for extent in reach):
            return None  # torch pads one side more than the other
        padding = tuple(extent // 2 for extent in reach)
    convolution = SparseConvolution(
        tuple(module.weight.shape),  # pyright: ignore[reportArgumentType]
        _pair(module.stride), padding, _pair(module.dilation), module.groups,
    )  # fmt: skip
    return convolution, Weights.kept(module.weight, module.bias)


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, before: torch.Size) -> _Read:
    if not _is_map(before) or module.running_mean is None or module.running_var is None:
        return None
    mean, variance = module.running_mean.double(), module.running_var.double()
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().double()
    return ChannelScales(len(scale)), Weights(shift.float(), scale.float())


def _max_pool(module: nn.MaxPool2d, before: torch.Size) -> _Read:
    plain = _pair(module.padding) == (0, 0) and _pair(module.dilation) == (1, 1)
    if len(before) != 4 or not plain or module.ceil_mode or module.return_indices:
        return None
    return MapMaximum(_pair(module.kernel_size), _pair(module.stride)), Weights()


def _mean(module: nn.AdaptiveAvgPool2d, before: torch.Size) -> _Read:
    if len(before) != 4 or module.output_size not in (1, (1, 1)):
        return None
    return MapMean(), Weights()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _shape(node: fx.Node) -> torch.Size | None:
    """Return the shape of a float32 value; None of anything else."""
    known = node.meta.get("tensor_meta")
    shape = getattr(known, "shape", None)
    if getattr(known, "dtype", None) != torch.float32:
        return None
    return shape if isinstance(shape, torch.Size) else None


def _is_map(shape: torch.Size) -> bool:
    return len(shape) in (2, 4)


def _flattens(before: torch.Size, after: torch.Size) -> bool:
    return len(after) == 2 and before[0] == after[0] and _is_map(before)


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
        ) if len(reads) == 1:
            # The maximum of activations is the activation of the maximum: both increase.
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
