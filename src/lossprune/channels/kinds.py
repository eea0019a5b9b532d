"""The modules, functions and methods whose effect on channels is known, by kind."""

import torch
import torch.nn.functional as F
from torch import nn

from lossprune.channels.operations import Product, Sum

POINTWISE_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Softshrink,
    nn.Hardshrink, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_FUNCTIONS = (
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid",
    "logsigmoid", "softplus", "softsign", "softshrink", "hardshrink", "tanhshrink", "hardtanh",
    "hardswish", "hardsigmoid", "threshold", "clamp", "clip", "abs", "neg", "exp", "sqrt", "square",
)  # fmt: skip
POINTWISE_NAMES = frozenset(name + ending for name in _FUNCTIONS for ending in ("", "_")) | {
    "contiguous",
    "detach",
}
# Of these the output is a tensor of its own, never a view of an input.
FRESH_NAMES = frozenset((*_FUNCTIONS, "add", "sub", "mul", "div", "truediv", "cat", "mean", "sum"))
POINTWISE_HOMES = (F, torch)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
BY_A_NUMBER = ("truediv", "itruediv", "div", "div_")
ARITHMETIC = {
    "add": Sum(), "iadd": Sum(), "add_": Sum(),
    "sub": Sum(-1), "isub": Sum(-1), "sub_": Sum(-1),
    "mul": Product(), "imul": Product(), "mul_": Product(),
}  # fmt: skip
POOL_MODULES = {
    kind: dimensions
    for dimensions in (1, 2, 3)
    for kind in (
        getattr(nn, f"{name}Pool{dimensions}d")
        for name in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg")
    )
}
POOL_FUNCTIONS = {
    function: dimensions
    for dimensions in (1, 2, 3)
    for function in (
        getattr(F, f"{name}_pool{dimensions}d")
        for name in ("max", "avg", "adaptive_max", "adaptive_avg")
    )
}
