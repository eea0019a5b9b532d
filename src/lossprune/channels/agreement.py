"""Whether two networks give the same."""

import math
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


def same_outputs(outputs: Any, expected: Any) -> bool:
    """Whether ``outputs`` are ``expected``, in the same containers; tensors to rounding.

    That is √ε of the largest finite number, ε being that of the type: 3·10⁻⁴ in single and
    1.5·10⁻⁸ in double precision.
    """
    found, structure = tree_flatten(outputs)
    wanted, like = tree_flatten(expected)
    return structure == like and all(map(_same, found, wanted))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _close(one, other)
    if type(one) is not type(other):
        return False
    if is_dataclass(one) and not isinstance(one, type):
        return same_outputs(vars(one), vars(other))
    # Objects of other classes, such as caches, hold what cannot be compared in general.
    return one == other if isinstance(one, int | float | complex | str) else True


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (other.is_floating_point() or other.is_complex()):
        return torch.equal(one, other)
    finite = other[other.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    tolerance = math.sqrt(torch.finfo(other.dtype).eps)
    return torch.allclose(one, other, rtol=0, atol=tolerance * largest, equal_nan=True)
