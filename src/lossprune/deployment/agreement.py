"""Whether two networks give the same."""

import math
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def same_outputs(outputs: Any, expected: Any) -> bool:
    """Whether the tensors in ``outputs`` are those in ``expected``, to rounding.

    That is √ε of the largest finite number, ε being that of the type: 3·10⁻⁴ in single and
    1.5·10⁻⁸ in double precision.
    """
    found, wanted = list(_tensors(outputs)), list(_tensors(expected))
    return len(found) == len(wanted) and all(map(_same, found, wanted))


def _tensors(outputs: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors(vars(leaf))


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (other.is_floating_point() or other.is_complex()):
        return torch.equal(one, other)
    finite = other[other.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    tolerance = math.sqrt(torch.finfo(other.dtype).eps)
    return torch.allclose(one, other, rtol=0, atol=tolerance * largest, equal_nan=True)
