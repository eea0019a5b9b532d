"""From a traced network to sparse steps: which operations the kernels know, and which they join.

``lowered`` reads a ``torch.fx`` graph whose shapes are known and returns, node by node, the step
that computes it, or nothing where torch must.  ``joined`` then puts what follows a convolution into
it: batch norm into its weights, an addition, an activation and a maximum over 2×2 into its end.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lossprune.deployment.sparse.steps import IDENTITY, RELU, TANH, Step, Weights

Lowered = tuple[Step, Weights]

_NOTHING = Weights(
    torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
)
_ACTIVATIONS: Mapping[Any, int] = {
    nn.ReLU: RELU, F.relu: RELU, torch.relu: RELU, "relu": RELU,
    nn.Tanh: TANH, F.tanh: TANH, torch.tanh: TANH, "tanh": TANH,
}  # fmt: skip
_SAME = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add")


def lowered(graph: fx.GraphModule, node: fx.Node) -> Lowered | str | None:
    """Return a node's step and weights; or the name of the value it leaves as it is; or None.

    Flattening and what does nothing in evaluation leave a value as it is.
    """
    shape = _shape(node)
    if shape is None:
        return None
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return _module(node, module, shape)
    if node.op in ("call_function", "call_method"):
        return _function(node, shape)
    return None


def _module(  # noqa: PLR0911, one return for each kind
    node: fx.Node, module: nn.Module, shape: torch.Size
) -> Lowered | str | None:
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    given = len(node.args) + len(node.kwargs)
    if module.training or own or len(node.all_input_nodes) != 1 or given != 1:
        return None
    source = node.all_input_nodes[0]
    before = _shape(source)
    if before is None:
        return None
    name = str(node.target)
    kind: Callable[..., Lowered | None] | None = {
        nn.Linear: _linear,
        nn.Conv2d: _convolution,
        nn.BatchNorm1d: _batch_norm,
        nn.BatchNorm2d: _batch_norm,
        nn.MaxPool2d: _max_pool,
        nn.AdaptiveAvgPool2d: _mean,
    }.get(type(module))
    if kind is not None:
        return kind(module, name, source.name, node.name, before)
    if type(module) in _ACTIVATIONS and _is_map(before):
        return _activation(name, source.name, node.name, _ACTIVATIONS[type(module)])
    if isinstance(module, _SAME) and _is_map(before):
        return source.name
    if isinstance(module, nn.Flatten) and _flattens(before, shape):
        return source.name
    return None


def _function(  # noqa: PLR0911, one return for each kind
    node: fx.Node, shape: torch.Size
) -> Lowered | str | None:
    inputs = node.all_input_nodes
    before = _shape(inputs[0]) if inputs else None
    if before is None or not _is_map(before):
        return None
    if node.target in _ADDITIONS:
        same = len(inputs) == 2 and _shape(inputs[1]) == before and set(node.args) == set(inputs)
        if not same or node.kwargs:
            return None
        step = Step("addition", node.name, inputs[0].name, node.name, other=inputs[1].name)
        return step, _NOTHING
    if len(inputs) != 1:
        return None
    source = inputs[0].name
    if node.target in _ACTIVATIONS:
        return _activation(node.name, source, node.name, _ACTIVATIONS[node.target])
    if node.target in (torch.flatten, "flatten", "view", "reshape", torch.reshape):
        return source if _flattens(before, shape) else None
    if node.target is F.adaptive_avg_pool2d and len(shape) == 4 and shape[2:] == (1, 1):
        return Step("mean", node.name, source, node.name), _NOTHING
    if node.target is F.max_pool2d:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        given.pop("input", None)
        pool = nn.MaxPool2d(**given)  # type: ignore[arg-type]
        return _max_pool(pool, node.name, source, node.name, before)
    return None


def _linear(module: nn.Linear, name: str, source: str, target: str, before: torch.Size) -> Any:
    if len(before) != 2:
        return None
    outputs, inputs = module.weight.shape
    step = Step(
        "convolution", name, source, target, weight_shape=(outputs, inputs, 1, 1), flat=True
    )
    return step, Weights.kept(module.weight, module.bias)


def _convolution(module: nn.Conv2d, name: str, source: str, target: str, before: torch.Size) -> Any:
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
    step = Step(
        "convolution", name, source, target,
        weight_shape=tuple(module.weight.shape),  # type: ignore[arg-type]
        stride=module.stride, padding=padding, dilation=module.dilation,  # type: ignore[arg-type]
        groups=module.groups,
    )  # fmt: skip
    return step, Weights.kept(module.weight, module.bias)


def _batch_norm(
    module: nn.BatchNorm1d | nn.BatchNorm2d, name: str, source: str, target: str,
    before: torch.Size,
) -> Any:  # fmt: skip
    if not _is_map(before) or module.running_mean is None or module.running_var is None:
        return None
    mean, variance = module.running_mean.double(), module.running_var.double()
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().double()
    return Step("affine", name, source, target), Weights.affine(scale, shift)


def _max_pool(module: nn.MaxPool2d, name: str, source: str, target: str, before: torch.Size) -> Any:
    size, stride = _pair(module.kernel_size), _pair(module.stride)
    plain = _pair(module.padding) == (0, 0) and _pair(module.dilation) == (1, 1)
    if len(before) != 4 or not plain or module.ceil_mode or module.return_indices:
        return None
    return Step("maximum", name, source, target, size=size, stride=stride), _NOTHING


def _mean(
    module: nn.AdaptiveAvgPool2d, name: str, source: str, target: str, before: torch.Size
) -> Any:
    if len(before) != 4 or module.output_size not in (1, (1, 1)):
        return None
    return Step("mean", name, source, target), _NOTHING


def _activation(name: str, source: str, target: str, kind: int) -> Lowered:
    # The shift 0 and scale 1 are filled in when the number of channels is known.
    return Step("affine", name, source, target, activation=kind), _NOTHING


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


def joined(parts: Sequence[Lowered], kept: set[str]) -> list[Lowered]:
    """Return the same steps, fewer: what follows a convolution alone becomes part of it.

    Args:
        parts: steps in order.
        kept: values that are read from outside, so must stay.
    """
    out: list[Lowered] = []
    reads: dict[str, int] = {}
    for step, _ in parts:
        for name in (step.source, step.other):
            if name is not None:
                reads[name] = reads.get(name, 0) + 1
    made: dict[str, int] = {}
    for step, weight in parts:
        done = None
        for name in (step.source, step.other):
            if name is None or name in kept or reads[name] != 1 or name not in made:
                continue
            place = made[name]
            earlier = {value for value, at in made.items() if at < place}
            done = _join(out[place], (step, weight), name, earlier, set(made))
            if done is not None:
                out[place] = done
                made[step.target] = place
                del made[name]
                break
        if done is None:
            made[step.target] = len(out)
            out.append((step, weight))
    return out


def _join(
    first: Lowered, second: Lowered, through: str, earlier: set[str], made: set[str]
) -> Lowered | None:
    """Return one step for two, where there is one; ``through`` is the value between them."""
    (a, weight), (b, more) = first, second
    if a.kind not in ("convolution", "affine", "addition"):
        return None
    if b.kind == "affine" and a.pool == 1 and a.activation == IDENTITY:
        if not more.shift.numel():
            return a.replace(target=b.target, activation=b.activation), weight
        if a.kind == "convolution" and a.other is None:
            name = f"{a.name}, {b.name}"
            joint = a.replace(target=b.target, activation=b.activation, name=name)
            return joint.replace(name=a.name), _scaled(weight, more, a)
    if b.kind == "addition" and a.kind == "convolution" and a.pool == 1:
        other = b.other if b.source == through else b.source
        known = other in earlier or other not in made
        if a.activation == IDENTITY and a.other is None and known and other != through:
            return a.replace(target=b.target, other=other, activation=b.activation), weight
    # No tile of the kernels has two columns at strides beyond 2.
    halves = b.kind == "maximum" and b.size == b.stride == (2, 2) and a.stride[1] <= 2
    if halves and a.kind == "convolution" and a.pool == 1 and a.other is None:
        # The maximum of activations is the activation of the maximum: both activations increase.
        return a.replace(target=b.target, pool=2), weight
    return None


def _scaled(weight: Weights, affine: Weights, step: Step) -> Weights:
    """Return a convolution's weights times the scales of the affine map that follows it."""
    each = step.weight_shape[1] * step.weight_shape[2] * step.weight_shape[3]
    scale = affine.scale.double()
    values = weight.values.double() * scale[weight.positions // each]
    shift = weight.shift.double() * scale + affine.shift.double()
    return Weights(shift.float(), weight.scale, weight.positions, values.float())


def filled(part: Lowered, channels: int) -> Lowered:
    """Give an activation that stands alone its scale 1 and shift 0."""
    step, weight = part
    if step.kind == "affine" and not weight.shift.numel():
        return step, Weights.affine(torch.ones(channels), torch.zeros(channels))
    return part
