"""Which of the kernels' operations a function of torch is, with which numbers."""

import math
from collections.abc import Mapping
from typing import Any

from lossprune.channels.operations import Mean, Pointwise, Pooling
from lossprune.deployment.sparse.steps import MapActivation, Numbers
from lossprune.deployment.sparse.windows import (
    MapAverage,
    MapMaximum,
    MapMean,
    MapNearest,
    MapWindows,
    Pair,
)
from lossprune.kernels.interface import Activation

# Activations whose numbers are arguments of torch's function; None: no bound.
_NUMBERS: Mapping[str, tuple[Activation, tuple[str, ...]]] = {
    "leaky_relu": (Activation.LEAKY_RELU, ("negative_slope",)),
    "elu": (Activation.ELU, ("alpha",)),
    "hardtanh": (Activation.CLAMP, ("min_val", "max_val")),
    "clamp": (Activation.CLAMP, ("min", "max")),
    "clip": (Activation.CLAMP, ("min", "max")),
}
_PLAIN = frozenset(Activation.__members__) - {one.name for one, _ in _NUMBERS.values()}


def activation_of(read: Pointwise) -> MapActivation | None:
    """Return the activation that a function is.

    >>> activation_of(Pointwise("relu6", lambda c: c.clamp(0, 6)))
    MapActivation(activation=<Activation.CLAMP: 9>, numbers=(0.0, 6.0))
    """
    if read.name == "relu6":
        return MapActivation(Activation.CLAMP, (0.0, 6.0))
    if read.name in _NUMBERS:
        kind, names = _NUMBERS[read.name]
        given = [read.arguments[name] for name in names]
        if all(isinstance(one, int | float | None) for one in given):
            numbers = [_bound(one, end) for one, end in zip(given, (-1, 1), strict=False)]
            return MapActivation(kind, (numbers[0], numbers[1] if len(numbers) > 1 else 0.0))
    if read.name.upper() in _PLAIN:
        return MapActivation(Activation[read.name.upper()])
    return None


def _bound(number: float | None, end: int) -> float:
    return end * math.inf if number is None else float(number)


def affine(read: Pointwise) -> Numbers | None:
    """Return (a, b) of a function a x + b: arithmetic with a number.

    >>> affine(Pointwise("sub", lambda c: 1 - c, {"left": 1, "right": None}))
    (-1.0, 1.0)
    """
    found: Numbers | None = None
    left, right = read.arguments.get("left"), read.arguments.get("right")
    match read.name.rstrip("_").removeprefix("i"), left, right:
        case "neg", None, None:
            found = -1.0, 0.0
        case ("add", None, number) | ("add", number, None) if number is not None:
            found = 1.0, float(number)
        case ("mul", None, number) | ("mul", number, None) if number is not None:
            found = float(number), 0.0
        case "sub", None, int() | float():
            found = 1.0, -float(right)
        case "sub", int() | float(), None:
            found = -1.0, float(left)
        case "div" | "truediv", None, int() | float() if right:
            found = 1 / right, 0.0
    return found


def windows_of(read: Pooling | Mean) -> MapWindows | None:
    """Return the windows of a pooling over images, (n, channels, height, width)."""
    if isinstance(read, Mean):
        return MapMean() if {d % 4 for d in read.dimensions} == {2, 3} else None
    given = read.arguments
    if read.kind == "nearest":
        return MapNearest(given["factor"])
    if read.kind == "adaptive_avg":
        rows, columns = both(given["output_size"])
        return MapMean((rows or 0, columns or 0))
    if read.kind not in ("max", "avg"):
        return None
    size, padding = both(given["kernel_size"]), both(given["padding"])
    form = (size, both(given["stride"] or size), padding, bool(given["ceil_mode"]))
    if read.kind == "avg":
        divisor = given["divisor_override"] or 0
        counted = bool(given["count_include_pad"])
        return MapAverage(*form, counted, divisor) if divisor >= 0 else None
    return MapMaximum(*form) if both(given["dilation"]) == (1, 1) else None


def both(value: Any) -> Pair:
    """Return a number of both dimensions, or one for each, as (vertical, horizontal).

    >>> both(3), both([1, 2]), both((4,))
    ((3, 3), (1, 2), (4, 4))
    """
    return (value[0], value[-1]) if isinstance(value, list | tuple) else (value, value)
