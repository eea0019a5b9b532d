"""A plan as C: its operations, and the arrays that they point to, as constants."""

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lossprune.deployment.sparse.plan import SparsePlan

_TYPES = {"float32": "float", "int32": "int32_t", "int64": "int64_t"}
_LINE = 12  # numbers in a line of text


def arrays_of(plan: SparsePlan) -> str:
    """Return the arrays that the operations point to: ``array_0``, ``array_1``, …."""
    return "".join(
        f"static const {_TYPES[str(array.dtype)]} array_{k}[] = {{\n{_numbers(array)}\n}};\n"
        for k, array in enumerate(_pointed(plan).values())
    )


def operations_of(plan: SparsePlan) -> str:
    """Return the operations, field by field; what is 0 is left out."""
    names = {address: f"array_{k}" for k, address in enumerate(_pointed(plan))}
    lines = [f"    {_struct(operation, names)}," for operation in plan.operations]
    return "static const Operation operations[] = {\n" + "\n".join(lines) + "\n};\n"


def _pointed(plan: SparsePlan) -> "dict[int, np.ndarray[Any, Any]]":
    """Return the arrays by their addresses; those without numbers have none."""
    return {tensor.data_ptr(): _array(tensor) for tensor in plan.keep if tensor.numel()}


def _array(tensor: Tensor) -> "np.ndarray[Any, Any]":
    return tensor.contiguous().view(-1).numpy()


def _numbers(array: "np.ndarray[Any, Any]") -> str:
    texts = [_number(number) for number in array.tolist()]
    lines = [", ".join(texts[k : k + _LINE]) for k in range(0, len(texts), _LINE)]
    return ",\n".join(lines)


def _number(number: float) -> str:
    if isinstance(number, int):
        return str(number)
    if math.isnan(number):
        return "0 / 0.0f"
    # Nine digits tell a number in single precision from all others.
    return f"{number:.8e}f" if math.isfinite(number) else f"{math.copysign(1, number):.0f} / 0.0f"


def _struct(value: ctypes.Structure, names: Mapping[int, str]) -> str:
    fields = []
    for name, kind, *_ in type(value)._fields_:
        field = getattr(value, name)
        if isinstance(field, ctypes.Structure):
            fields.append(f".{name} = {_struct(field, names)}")
        elif field and kind is ctypes.c_void_p:
            fields.append(f".{name} = {names[field]}")
        elif field:
            fields.append(f".{name} = {field}")
    return "{" + (", ".join(fields) or "0") + "}"
