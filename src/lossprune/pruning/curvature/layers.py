"""Where a network uses its prunable weights: seen from outside, without hooks, in one forward pass.

Index letters, here and in ``squares.py``: n example, k column of the Hessian factor, g group,
o output channel within its group, i input of one output (channel within its group × kernel
position), p output position (pixel or token).
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lossprune.pruning.errors import PruningError


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ over the last dimension; every dimension between it and the first is a position.

    Attributes:
        transposed: whether the weight is stored as Wᵀ, (inputs, outputs).
    """

    transposed: bool = False

    def patches(self, inputs: Tensor) -> Tensor:
        """Inputs of every output position: (n, 1, i, p)."""
        return inputs.reshape(inputs.shape[0], 1, -1, inputs.shape[-1]).transpose(2, 3)

    def columns(self, gradients: Tensor) -> Tensor:
        """Gradients (n, k, *output) by output and position: (n, k, 1, o, p)."""
        n, k, *_, o = gradients.shape
        return gradients.reshape(n, k, 1, -1, o).transpose(3, 4)

    def positions(self, output: torch.Size) -> int:
        """Count the positions of an output of that shape."""
        return output[1:-1].numel()

    def grouped(self, weight: Tensor) -> Tensor:
        """View of the weight, or of what belongs to it, as (g, o, i)."""
        return (weight.T if self.transposed else weight)[None]


@dataclass(frozen=True)
class Convolution:
    """A 1-, 2- or 3-dimensional convolution (cross-correlation)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after, per dimension
    dilation: tuple[int, ...]
    groups: int

    def patches(self, inputs: Tensor) -> Tensor:
        """Inputs of every output position: (n, g, i, p)."""
        n = inputs.shape[0]
        dimensions = len(self.kernel)
        if any(pad != (0, 0) for pad in self.padding):
            inputs = F.pad(inputs, [side for pad in reversed(self.padding) for side in pad])
        windows = inputs
        for axis, (size, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True), start=2
        ):
            windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # (n, channel, *positions, *kernel) → (n, channel, *kernel, *positions)
        kernel_axes = range(2 + dimensions, 2 + 2 * dimensions)
        windows = windows.permute(0, 1, *kernel_axes, *range(2, 2 + dimensions))
        positions = windows.shape[2 + dimensions :].numel()
        return windows.reshape(n, self.groups, -1, positions)

    def columns(self, gradients: Tensor) -> Tensor:
        """Gradients (n, k, *output) by output and position: (n, k, g, o, p)."""
        n, k, channels = gradients.shape[:3]
        return gradients.reshape(n, k, self.groups, channels // self.groups, -1)

    def positions(self, output: torch.Size) -> int:
        """Count the positions of an output of that shape."""
        return output[2:].numel()

    def grouped(self, weight: Tensor) -> Tensor:
        """View of the weight, or of what belongs to it, as (g, o, i)."""
        return weight.view(self.groups, weight.shape[0] // self.groups, -1)


Geometry = Linear | Convolution
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


def _per_dimension(value: Any, dimensions: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dimensions
    return tuple(value) * (dimensions if len(value) == 1 else 1)


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
}


class LayerCalls(TorchFunctionMode):
    """While entered, records every call of a linear or convolution function on a given weight.

    Linear are ``F.linear`` and products x W with the weight on the right, such as ``torch.addmm``.

    It looks at the functions that layers call, not at the layers: weights that layers share,
    layers that run twice and functional uses are all seen, and the network is not touched.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []
        self._names = {id(weight): name for name, weight in weights.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        seen = _CALLS[func](*args, **kwargs) if func in _CALLS else None
        name = None if seen is None else self._names.get(id(seen[1]))
        if seen is None or name is None:
            return func(*args, **kwargs)
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

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call attention as far as its output projection, and that as a layer of its own.

        torch dispatches attention as a whole, so the projection inside it would not be seen.  With
        the identity for its weight it returns what the projection gets: (tokens, n, features).
        """
        bound = inspect.signature(func).bind(*args, **kwargs)
        weight, bias = (bound.arguments[f"out_proj_{part}"] for part in ("weight", "bias"))
        if id(weight) not in self._names:
            return func(*args, **kwargs)
        bound.arguments["out_proj_weight"] = torch.eye(
            len(weight), dtype=weight.dtype, device=weight.device
        )
        bound.arguments["out_proj_bias"] = None
        heads, attention = func(*bound.args, **bound.kwargs)
        batched = heads.ndim == 3
        heads = heads.transpose(0, 1) if batched else heads
        output = self.__torch_function__(F.linear, (), (heads, weight, bias))
        return (output.transpose(0, 1) if batched else output), attention

    def _replacements(self, inputs: Tensor, weight: Tensor) -> dict[int, Tensor]:
        """What to call the function on instead, by the identity of the original."""
        differentiable = inputs.is_floating_point() or inputs.is_complex()
        if inputs.requires_grad or not differentiable:  # the latter, torch will say, do not do
            return {}
        # Only so that the output has a place in the graph; no gradient is ever taken here.
        return {id(inputs): inputs.detach().requires_grad_()}
