"""What a file may ask of torch: operations by name that compute tensors, and do nothing else.

No name is looked up in torch itself, where a file would find functions that read or run others.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lossprune.deployment.opened import attended
from lossprune.deployment.sparse.token_lowering import heads_attended, key_bias, patch_rows

_OPERATORS = "add sub mul truediv floordiv mod pow neg matmul getitem eq ne lt le gt ge"
_TORCH = (
    "abs add addmm amax amin baddbmm bmm cat chunk clamp cos div einsum erf exp flatten log "
    "masked_fill matmul maximum mean minimum mul neg ones_like permute pow relu reshape rsqrt "
    "sigmoid sin softmax split sqrt square squeeze stack sub sum tanh transpose unbind unsqueeze "
    "where zeros_like"
)
_FUNCTIONAL = (
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d batch_norm "
    "conv1d conv2d conv3d dropout elu embedding gelu glu group_norm hardsigmoid hardswish hardtanh "
    "instance_norm interpolate layer_norm leaky_relu linear log_softmax max_pool1d max_pool2d mish "
    "normalize pad relu relu6 scaled_dot_product_attention sigmoid silu softmax softplus tanh"
)
_METHODS = (
    "abs add amax amin bmm chunk clamp contiguous cos dim div exp expand expand_as flatten float "
    "masked_fill matmul mean mul neg permute pow relu repeat reshape rsqrt sigmoid sin size "
    "softmax split sqrt squeeze sub sum t tanh transpose unbind unflatten unsqueeze view view_as"
)
_MODULES = (
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveMaxPool2d AvgPool1d AvgPool2d BatchNorm1d "
    "BatchNorm2d BatchNorm3d Conv1d Conv2d Conv3d Dropout Dropout1d Dropout2d ELU Embedding "
    "Flatten GELU GroupNorm Hardsigmoid Hardswish Hardtanh Identity InstanceNorm1d InstanceNorm2d "
    "LayerNorm LeakyReLU Linear LogSoftmax MaxPool1d MaxPool2d Mish RMSNorm ReLU ReLU6 SiLU "
    "Sigmoid Softmax Softplus Tanh Unflatten Upsample ZeroPad2d"
)

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split()},
    **{f"F.{name}": getattr(F, name) for name in _FUNCTIONAL.split()},
    "attended": attended,
    "heads_attended": heads_attended,
    "key_bias": key_bias,
    "patch_rows": patch_rows,
}
METHODS = frozenset(_METHODS.split())
MODULES: Mapping[str, type[nn.Module]] = {name: getattr(nn, name) for name in _MODULES.split()}
NAMES = {function: name for name, function in FUNCTIONS.items()}
