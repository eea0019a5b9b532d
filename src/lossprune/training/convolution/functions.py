"""Operations over blocks of images, with their gradients."""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lossprune.training.convolution import between, kernel
from lossprune.training.convolution.memory import POOL
from lossprune.training.convolution.structure import (
    Convolution,
    Passes,
    input_passes,
    output_passes,
)


@dataclass(frozen=True)
class Relu:
    """What of the ReLU before and after a layer is the layer's.

    A gradient is gated where it is read or written anyway: a layer that alone reads what a ReLU
    gives gates the gradient that it returns, and the layer with that ReLU need not do it again.

    Attributes:
        after: whether the outputs are rectified.
        gated: whether their gradient comes gated.
        before: whether the inputs are a ReLU's whose gradient this layer is to gate.
    """

    after: bool = False
    gated: bool = False
    before: bool = False

    @property
    def gates(self) -> bool:
        """Whether the gradient of the outputs is gated here."""
        return self.after and not self.gated


NO_RELU = Relu()


class KeptConvolution:
    """A convolution over the kept weights alone.

    Args:
        layer: what is computed.
        kept: positions of the kept weights in the flattened kernel, ascending: int64.
    """

    def __init__(self, layer: Convolution, kept: Tensor) -> None:
        self.layer, self._kept = layer, kept
        self._outputs = functools.cache(partial(output_passes, layer, kept))
        self._inputs = functools.cache(partial(input_passes, layer, kept))

    def outputs(self, blocks: int) -> Passes:
        """The passes of the outputs of so many blocks, for torch's threads as they are now."""
        return self._outputs(blocks, torch.get_num_threads())

    def inputs(self, blocks: int) -> Passes:
        """The passes of the inputs' gradient."""
        return self._inputs(blocks, torch.get_num_threads())

    def __call__(
        self, x: Tensor, values: Tensor, bias: Tensor | None, relu: Relu = NO_RELU
    ) -> Tensor:
        """Return the outputs.

        Args:
            x: blocks of images.
            values: of the kept weights, (kept,).
            bias: (outputs,).
            relu: before and after.
        """
        return _Convolve.apply(x, values, bias, self, relu)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, by: KeptConvolution, relu: Relu
    ) -> Tensor:
        x = x.contiguous()
        passes = by.outputs(x.shape[0])
        channels, height, width = by.layer.output_shape
        out = POOL.empty((x.shape[0], height, channels, width, x.shape[-1]))
        entries = _of_entries(values, passes)
        kernel.convolve(passes.structs, entries, x, None, bias, out, relu=relu.after)
        ctx.by, ctx.relu = by, relu
        ctx.save_for_backward(x, values, out if relu.gates else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, values, out = ctx.saved_tensors
        gradient = grad_outputs[0].contiguous()
        to_x = to_values = to_bias = None
        if ctx.needs_input_grad[0]:
            passes = ctx.by.inputs(x.shape[0])
            to_x = POOL.empty(x.shape)
            entries = _of_entries(values, passes)
            gate = x if ctx.relu.before else None
            kernel.convolve(passes.structs, entries, gradient, out, None, to_x, out_gate=gate)
        if any(ctx.needs_input_grad[1:3]):
            passes = ctx.by.outputs(x.shape[0])
            of_entries = values.new_zeros(len(passes.index))
            if ctx.needs_input_grad[2]:
                to_bias = gradient.new_zeros(gradient.shape[2])
            kernel.correlate_weights(passes.structs, x, out, gradient, of_entries, to_bias)
            to_values = torch.zeros_like(values).index_add_(0, passes.index, of_entries)
        return to_x, to_values, to_bias, None, None


def _of_entries(values: Tensor, passes: Passes) -> Tensor:
    return values.detach().index_select(0, passes.index)


@dataclass(frozen=True)
class Normalisation:
    """Batch normalisation by the batch's own statistics; ``images`` of the lanes have one."""

    images: int
    epsilon: float
    relu: Relu

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs, and mean and biased variance of each channel."""
        return _Normalise.apply(x, weight, bias, self)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, by: Normalisation
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        mean, variance = between.moments(x, by.images)
        scale = (variance + by.epsilon).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        out = between.scaled(x, scale, shift, relu=by.relu.after)
        ctx.by = by
        ctx.save_for_backward(x, weight, mean, variance, out if by.relu.gates else None)
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, variance, out = ctx.saved_tensors
        gradient = grad_outputs[0].contiguous()
        found = between.normalise_gradient(
            x, gradient, out, mean, variance, weight, ctx.by.epsilon, ctx.by.images
        )
        return *(g if n else None for g, n in zip(found, ctx.needs_input_grad, strict=False)), None


@dataclass(frozen=True)
class Maximum:
    """The maximum over windows, as :class:`torch.nn.MaxPool2d`."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    rectified: bool = False  # see Relu.before

    def __call__(self, x: Tensor) -> Tensor:
        """Return the maxima of blocks of images."""
        return _Maximise.apply(x, self)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Rows and columns of each."""
        return *self.size, *self.stride, *self.padding


class _Maximise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Maximum) -> Tensor:
        x = x.contiguous()
        ctx.by = by
        ctx.save_for_backward(x)
        return between.maxima(x, by.numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gradient, by = grad_outputs[0].contiguous(), ctx.by
        return between.maxima_gradient(x, gradient, by.numbers, rectified=by.rectified), None
