"""Poolings, and what makes maps larger, however a network's code writes them."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from lossprune.channels.arguments import arguments, has_nodes
from lossprune.channels.operations import Pooling

# Arguments of the poolings after the tensor, in order, and what they are where they are left out.
_POOLINGS: Mapping[str, Mapping[str, Any]] = {
    "max": {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False,
            "return_indices": False},
    "avg": {"kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False,
            "count_include_pad": True, "divisor_override": None},
    "adaptive_max": {"output_size": None, "return_indices": False},
    "adaptive_avg": {"output_size": None},
}  # fmt: skip
_INTERPOLATION = {"size": None, "scale_factor": None, "mode": "nearest"}
_WINDOWED = {
    getattr(nn, f"{kind.title().replace('_', '')}Pool{d}d"): (kind, d)
    for kind in _POOLINGS
    for d in (1, 2, 3)
}
_WINDOWED_CALLS = {
    getattr(F, f"{kind}_pool{d}d"): (kind, d) for kind in _POOLINGS for d in (1, 2, 3)
}
_NEAREST = (nn.Upsample, nn.UpsamplingNearest2d)
POOL_MODULES = (*_WINDOWED, *_NEAREST)
POOL_FUNCTIONS = (*_WINDOWED_CALLS, F.interpolate)


def pooling_module(module: nn.Module) -> Pooling | None:
    """Return what one of ``POOL_MODULES`` computes; None where that is not known."""
    kind = type(module)
    if kind in _NEAREST:
        return _nearest(vars(module))
    pooling, dimensions = _WINDOWED[kind]
    usual = _POOLINGS[pooling]
    given = {name: getattr(module, name, default) for name, default in usual.items()}
    return _pooling(pooling, dimensions, given)


def pooling_call(node: fx.Node) -> Pooling | None:
    """Return what a call of one of ``POOL_FUNCTIONS`` computes; None where that is not known."""
    function: Any = node.target
    if function is F.interpolate:
        return _nearest(arguments(node, _INTERPOLATION))
    kind, dimensions = _WINDOWED_CALLS[function]
    return _pooling(kind, dimensions, arguments(node, _POOLINGS[kind]))


def _pooling(kind: str, dimensions: int, given: Mapping[str, Any]) -> Pooling | None:
    own = {name: value for name, value in given.items() if name != "input"}
    known = not own.get("return_indices") and not has_nodes(own)
    return Pooling(kind, dimensions, own) if known else None


def _nearest(given: Mapping[str, Any]) -> Pooling | None:
    """Each position of an image a whole number of times, where that is what is asked for."""
    factor = given["scale_factor"]
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    whole = all(isinstance(one, int | float) and one >= 1 and one == int(one) for one in factors)
    plain = given["mode"] == "nearest" and given["size"] is None and len(factors) == 2
    return Pooling("nearest", 2, {"factor": tuple(map(int, factors))}) if whole and plain else None
