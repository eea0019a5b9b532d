"""A plan as C: its operations, and the arrays that they point to, as constants."""

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lossprune.deployment.sparse.plan import SparsePlan

_TYPES = {"float32": "float", "int32": "int32_t", "int64": "int64_t"}
_LINE = 12  # numbers in a line of text


def arrays_of(plans: Sequence[SparsePlan]) -> tuple[str, dict[int, str]]:
    """Return the arrays that the operations point to, equal ones once, and names by address."""
    known: dict[tuple[str, bytes], str] = {}
    names: dict[int, str] = {}
    texts = []
    for tensor in (tensor for plan in plans for tensor in plan.keep if tensor.numel()):
        array = tensor.contiguous().view(-1).numpy()
        kind = _TYPES[str(array.dtype)]
        key = kind, array.tobytes()
        if key not in known:
            known[key] = f"array_{len(known)}"
            texts.append(f"static const {kind} {known[key]}[] = {{\n{_numbers(array)}\n}};\n")
        names[tensor.data_ptr()] = known[key]
    return "".join(texts), names


def operations_of(plan: SparsePlan, names: Mapping[int, str]) -> str:
    """Return the operations, field by field, with arrays by name; what is 0 is left out."""
    lines = [f"    {_struct(operation, names)}," for operation in plan.operations]
    return "{\n" + "\n".join(lines) + "\n}"


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
            fields.append(f".{name} = {_number(field)}")
    return "{" + (", ".join(fields) or "0") + "}"
