"""What one node of a network's graph computes, in whichever way the network's code writes it.

``nn.ReLU()(x)``, ``F.relu(x)``, ``torch.relu(x)`` and ``x.relu_()`` are one operation, and so is a
pooling by a module or by a function, with its arguments in order or by name.  Which channels an
operation leads to which is in ``operations.py`` and ``interpretation.py``; which compiled step
computes it in ``deployment/sparse/lowering.py``.
"""

import copy
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lossprune.channels.arguments import arguments, has_nodes
from lossprune.channels.operations import (
    Concatenation,
    Flatten,
    Mean,
    Operation,
    Pointwise,
    Product,
    Sum,
)
from lossprune.channels.poolings import (
    POOL_FUNCTIONS,
    POOL_MODULES,
    pooling_call,
    pooling_module,
)

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Layer = nn.Linear | Convolution | BatchNorm

_FUNCTIONS = (
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid",
    "logsigmoid", "softplus", "softsign", "softshrink", "hardshrink", "tanhshrink", "hardtanh",
    "hardswish", "hardsigmoid", "threshold", "clamp", "clip", "abs", "neg", "exp", "sqrt", "square",
)  # fmt: skip
_POINTWISE_MODULES = {
    kind: name
    for kind in (
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
        nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink,
        nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold,
    )
    for name in _FUNCTIONS
    if name.replace("_", "") == kind.__name__.lower()
}  # fmt: skip
# What else than the numbers decides a function's values, and what it is where it is left out.
_POINTWISE_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "clamp": {"min": None, "max": None},
    "clip": {"min": None, "max": None},
}
_IDENTITY = Pointwise("identity", lambda tensor: tensor)
_IDENTITIES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
_POINTWISE = frozenset(name + ending for name in _FUNCTIONS for ending in ("", "_")) | {
    "contiguous",
    "detach",
}
# Of these the output is a tensor of its own, never a view of an input.
_FRESH = frozenset((*_FUNCTIONS, "add", "sub", "mul", "div", "truediv", "cat", "mean", "sum"))
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
_HOMES = (Tensor, F, torch, operator)
_BY_A_NUMBER = ("truediv", "itruediv", "div", "div_")
_ARITHMETIC = {
    "add": Sum(), "iadd": Sum(), "add_": Sum(),
    "sub": Sum(-1), "isub": Sum(-1), "sub_": Sum(-1),
    "mul": Product(), "imul": Product(), "mul_": Product(),
}  # fmt: skip
_IN_PLACE = (operator.iadd, operator.isub, operator.imul)


def read_module(module: nn.Module) -> Operation | Layer | None:
    """Return what ``module`` computes in evaluation mode: itself, where it has weights.

    None where that is not known.
    """
    kind = type(module)
    if isinstance(module, Layer) and kind in Layer.__args__:
        return module
    if kind in _IDENTITIES:
        return _IDENTITY
    if kind in _POINTWISE_MODULES:
        name = _POINTWISE_MODULES[kind]
        given = {one: getattr(module, one) for one in _POINTWISE_ARGUMENTS.get(name, ())}
        return Pointwise(_variant(name, vars(module)), copy.deepcopy(module).eval(), given)
    if kind in POOL_MODULES:
        return pooling_module(module)
    whole = kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    return Flatten() if whole else None


def read_call(node: fx.Node) -> Operation | None:
    """Return what a call of a function or method computes; None where that is not known."""
    function: Any = node.target
    if node.op == "call_method":
        function = getattr(Tensor, function, None)
    name = getattr(function, "__name__", "")
    read = _readers().get(function)
    if read is not None:
        return read(node)
    if all(getattr(home, name, None) is not function for home in _HOMES):
        return None
    if name in _ARITHMETIC or name in _BY_A_NUMBER:
        return _arithmetic(name, function, node)
    others = node.args[1:]
    if name not in _POINTWISE or has_nodes(others) or has_nodes(node.kwargs):
        return None
    plain = name.rstrip("_")
    usual = _POINTWISE_ARGUMENTS.get(plain, {})
    given = {one: value for one, value in arguments(node, usual).items() if one in usual}
    own = _variant(plain, node.kwargs)
    return Pointwise(own, lambda c: function(c, *others, **node.kwargs), given)


def _variant(name: str, options: Mapping[str, Any]) -> str:
    """Return the name of a function as it is with these options."""
    approximate = options.get("approximate", "none") if name == "gelu" else "none"
    return name if approximate == "none" else f"{name}_{approximate}"


def _readers() -> dict[Any, Callable[[fx.Node], Operation | None]]:
    """The functions that need a closer look at their arguments."""
    return {
        **dict.fromkeys(POOL_FUNCTIONS, pooling_call),
        **dict.fromkeys(_DROPOUTS, _dropout),
        **dict.fromkeys((torch.cat, torch.concat), _concatenation),
        **dict.fromkeys((torch.flatten, Tensor.flatten), _flatten),
        **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    }


def _dropout(node: fx.Node) -> Pointwise | None:
    off = arguments(node, {"p": 0.5, "training": True})["training"] is False
    return _IDENTITY if off else None


def _flatten(node: fx.Node) -> Flatten | None:
    given = arguments(node, {"start_dim": 0, "end_dim": -1})
    return Flatten() if (given["start_dim"], given["end_dim"]) == (1, -1) else None


def _arithmetic(name: str, function: Any, node: fx.Node) -> Operation | None:
    if node.kwargs or len(node.args) != 2:
        return None
    if all(isinstance(argument, fx.Node) for argument in node.args):
        return _ARITHMETIC.get(name)
    if not all(isinstance(argument, fx.Node | int | float) for argument in node.args):
        return None
    left, right = (None if isinstance(one, fx.Node) else one for one in node.args)
    return Pointwise(
        name,
        lambda c: function(*(c if isinstance(a, fx.Node) else a for a in node.args)),
        {"left": left, "right": right},
    )


def _mean(node: fx.Node) -> Operation | None:
    given = arguments(node, {"dim": None, "keepdim": False})
    dimensions = given.pop("dim")
    keep = given.pop("keepdim")
    if given or dimensions is None or has_nodes(dimensions):
        return None
    return Mean(frozenset((dimensions,) if isinstance(dimensions, int) else dimensions), keep)


def _concatenation(node: fx.Node) -> Operation | None:
    dimension = arguments(node, {"dim": 0})["dim"]
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    known = isinstance(tensors, tuple | list) and isinstance(dimension, int)
    return Concatenation(dimension) if known else None


def scale_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor] | None:
    """Return s and t, float64 (channels,), with which ``norm`` maps c to s · c + t.

    None if it keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        return None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


def paddings(layer: Convolution) -> list[tuple[int, int]]:
    """Return how much a convolution pads before and after, for each dimension of positions."""
    if layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        reaches = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(reach // 2, reach - reach // 2) for reach in reaches]
    return [(int(size), int(size)) for size in layer.padding]


def changed(module: nn.Module) -> str | None:
    """Return why a module may do something else than its class; None: it does not."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks"
    return "its forward method was replaced" if "forward" in vars(module) else None


def in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether ``node`` may write its output over its input."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        # What could not be traced may do anything with its input.
        own = not type(module).__module__.startswith("torch.nn.")
        return own or bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    # A True after the tensor, as in F.relu(x, True), may be the flag; taking it for one is safe.
    flagged = node.kwargs.get("inplace") is True or any(flag is True for flag in node.args[1:])
    return node.op == "call_function" and (
        node.target in _IN_PLACE or name.endswith("_") or flagged
    )


def may_be_view(model: nn.Module, node: fx.Node) -> bool:
    """Whether the output of ``node`` may share memory with an input, as views do."""
    if in_place(model, node):
        return True
    if node.op == "call_module":
        kind = type(model.get_submodule(str(node.target))).__name__
        return kind in ("Identity", "Flatten", "Unflatten") or "Dropout" in kind
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name not in _FRESH and "pool" not in str(name)


def is_shape(node: Any) -> bool:
    """Whether a node is all sizes of a tensor: x.shape or x.size()."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.op == "call_method" and node.target == "size" and len(node.args) == 1
