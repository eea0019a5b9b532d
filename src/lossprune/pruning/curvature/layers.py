"""Where a network uses its prunable weights: seen from outside, without any hooks."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lossprune.pruning.curvature.composites import written_out
from lossprune.pruning.curvature.geometry import (
    Convolution,
    Geometry,
    Linear,
    Lookup,
    TransposedConvolution,
    layout,
)
from lossprune.pruning.errors import PruningError

Seen = tuple[Tensor, Tensor, Geometry]  # input, weight and geometry of a layer's function


@dataclass(frozen=True)
class LayerCall:
    """One use of one prunable weight in a forward pass."""

    name: str
    inputs: Tensor
    inputs_version: int
    output: GradientEdge  # of the layer itself, whatever is done in place to its result later
    output_shape: torch.Size
    geometry: Geometry

    def check(self) -> None:
        """Raise if the layer's input is no longer what the layer saw."""
        if self.inputs._version != self.inputs_version:
            raise PruningError(
                f"the input of the layer of {self.name!r} was changed in place after the layer "
                "had seen it, so its curvature cannot be measured"
            )

    def has_rows_of(self, examples: int) -> bool:
        """Whether the first dimension can be the examples, or these and another folded."""
        return self.output_shape[0] % examples == 0


def apart(calls: Iterable[LayerCall], examples: int) -> set[str]:
    """Return the names of weights whose uses do not show the examples, or not in one layout."""
    layouts: dict[str, set[Any]] = {}
    names = set()
    for call in calls:
        layouts.setdefault(call.name, set()).add(layout(call.geometry))
        if not call.has_rows_of(examples) or len(layouts[call.name]) > 1:
            names.add(call.name)
    return names


def _linear_call(
    input: Tensor,  # noqa: A002 - torch's argument names, which callers may use as keywords
    weight: Tensor,
    bias: Tensor | None = None,
) -> Seen:
    return input, weight, Linear()


def _convolution_call(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Seen:
    kernel = tuple(weight.shape[2:])
    dilation = _per_dimension(dilation, len(kernel))
    if padding == "same":
        extra = [rate * (size - 1) for rate, size in zip(dilation, kernel, strict=True)]
        sides = tuple((total // 2, total - total // 2) for total in extra)
    elif padding == "valid":
        sides = ((0, 0),) * len(kernel)
    else:
        sides = tuple((pad, pad) for pad in _per_dimension(padding, len(kernel)))
    stride = _per_dimension(stride, len(kernel))
    return input, weight, Convolution(kernel, stride, sides, dilation, groups)


def _transposed_call(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Seen | None:
    kernel = tuple(weight.shape[2:])
    stride, padding, extra, dilation = (
        _per_dimension(value, len(kernel)) for value in (stride, padding, output_padding, dilation)
    )
    if input.ndim != weight.ndim or any(e >= s for e, s in zip(extra, stride, strict=True)):
        return None
    sides = tuple((pad, pad) for pad in padding)
    reverse = Convolution(kernel, stride, sides, dilation, groups)
    return input, weight, TransposedConvolution(reverse, tuple(input.shape[2:]))


def _per_dimension(value: Any, dimensions: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dimensions
    return tuple(value) * (dimensions if len(value) == 1 else 1)


def _lookup_call(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Seen | None:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    return input, weight, Lookup(None if padding_idx is None else padding_idx % len(weight))


def _product_call(
    input: Tensor,  # noqa: A002
    other: Tensor,
) -> Seen | None:
    if not isinstance(input, Tensor) or input.ndim < 2:
        return None
    return input, other, Linear(transposed=True)


def _addmm_call(
    input: Tensor,  # noqa: A002
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Seen | None:
    return (mat1, mat2, Linear(transposed=True)) if alpha == 1 else None


_CALLS: dict[Callable[..., Any], Callable[..., Seen | None]] = {
    F.linear: _linear_call,
    torch.addmm: _addmm_call,
    torch.mm: _product_call,
    torch.matmul: _product_call,
    Tensor.mm: _product_call,
    Tensor.matmul: _product_call,
    Tensor.__matmul__: _product_call,
    torch.conv1d: _convolution_call,
    torch.conv2d: _convolution_call,
    torch.conv3d: _convolution_call,
    torch.conv_transpose1d: _transposed_call,
    torch.conv_transpose2d: _transposed_call,
    torch.conv_transpose3d: _transposed_call,
}


_CALLS_AND_LOOKUPS = {**_CALLS, F.embedding: _lookup_call}


class WeightCalls(TorchFunctionMode):
    """While entered, sees every call of a linear or convolution function on a given weight.

    Linear are ``F.linear`` and products x W with the weight on the right, such as ``torch.addmm``.

    It looks at the functions that layers call, not at the layers: weights that layers share,
    layers that run twice and functional uses are all seen, and the network is not touched.
    """

    functions: Mapping[Callable[..., Any], Callable[..., Seen | None]] = _CALLS

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = written_out(func, args)
        if written is not None and any(id(x) in self._names for x in tree_leaves((args, kwargs))):
            return written(
                lambda *parts: self.__torch_function__(F.linear, (), parts), *args, **kwargs
            )
        read = self.functions.get(func)
        seen = None if read is None else read(*args, **kwargs)
        name = None if seen is None else self._names.get(id(seen[1]))
        if seen is None or name is None:
            return func(*args, **kwargs)
        return self._called(name, seen, func, args, kwargs)

    def _called(self, name: str, seen: Seen, func: Any, args: Any, kwargs: Any) -> Any:
        """Note the call, and return what the function gives."""
        raise NotImplementedError


class LayerCalls(WeightCalls):
    """While entered, records these calls and ``F.embedding``'s, with their places in the graph."""

    functions = _CALLS_AND_LOOKUPS

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.calls: list[LayerCall] = []

    def _called(self, name: str, seen: Seen, func: Any, args: Any, kwargs: Any) -> Any:
        inputs, weight, geometry = seen
        if not torch.is_grad_enabled():
            raise PruningError(
                f"{name!r} is used where gradients are switched off (torch.no_grad, or activation "
                "checkpointing with use_reentrant=True, where False will do), so its curvature "
                "cannot be measured"
            )
        swap = self._replacements(inputs, weight)
        args = [swap.get(id(arg), arg) for arg in args]
        kwargs = {key: swap.get(id(arg), arg) for key, arg in kwargs.items()}
        output = func(*args, **kwargs)
        if output._is_view():
            # Something done in place to a view would cut it off from the graph recorded here.
            output = output.clone()
        inputs = inputs.detach()
        edge = get_gradient_edge(output)
        self.calls.append(LayerCall(name, inputs, inputs._version, edge, output.shape, geometry))
        return output

    def _replacements(self, inputs: Tensor, weight: Tensor) -> dict[int, Tensor]:
        """What to call the function on instead, by the identity of the original."""
        differentiable = inputs.is_floating_point() or inputs.is_complex()
        if inputs.requires_grad or not differentiable:  # the latter, torch will say, do not do
            return {}
        # Only so that the output has a place in the graph; no gradient is ever taken here.
        return {id(inputs): inputs.detach().requires_grad_()}
