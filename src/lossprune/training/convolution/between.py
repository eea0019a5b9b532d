"""The compiled side of what stands between convolutions: structures over tensors, and the calls."""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossprune.kernels import threads
from lossprune.kernels.compiler import load
from lossprune.kernels.threads import ThreadsStruct
from lossprune.training.convolution.kernel import pointer
from lossprune.training.convolution.memory import POOL

SOURCE = Path(__file__).with_name("between_layers.c")


class MapsStruct(ctypes.Structure):
    """``Maps``: blocks of images, as in ``blocks.py``, and how many images there are."""

    _fields_ = [(name, c_int64) for name in ("blocks", "height", "channels", "width", "images")]


class WindowStruct(ctypes.Structure):
    """``Window``: of a maximum."""

    _fields_ = [
        (name, c_int64)
        for name in (
            "size_y", "size_x", "stride_y", "stride_x", "padding_y", "padding_x", "height", "width"
        )
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled functions.

    Raises:
        NoCompiler: they cannot be built here.
    """
    built = load(
        SOURCE, structures={"Maps": MapsStruct, "Window": WindowStruct, "Threads": ThreadsStruct}
    )
    pointer, team = c_void_p, (c_int64, c_void_p)
    built.moments.argtypes = [*(pointer,) * 4, *team]
    built.scaled.argtypes = [*(pointer,) * 4, c_int64, pointer, *team]
    built.normalise_gradient.argtypes = [*(pointer,) * 7, c_float, *(pointer,) * 3, *team]
    built.maxima.argtypes = [*(pointer,) * 4, *team]
    built.maxima_gradient.argtypes = [*(pointer,) * 4, c_int64, pointer, *team]
    for name in ("moments", "scaled", "normalise_gradient", "maxima", "maxima_gradient"):
        getattr(built, name).restype = None
    return built


def moments(x: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, over the images and positions."""
    mean, variance = x.new_empty(x.shape[2]), x.new_empty(x.shape[2])
    library().moments(_maps(x, images), *_pointers(x, mean, variance), *threads.team())
    return mean, variance


def scaled(x: Tensor, scale: Tensor, shift: Tensor, *, relu: bool) -> Tensor:
    """Return x · scale + shift, rectified if asked for; a factor and a shift for each channel."""
    out = POOL.empty(x.shape)
    scale, shift = scale.contiguous(), shift.contiguous()
    library().scaled(_maps(x, 0), *_pointers(x, scale, shift), relu, pointer(out), *threads.team())
    return out


def normalise_gradient(
    x: Tensor, gradient: Tensor, out: Tensor | None, mean: Tensor, variance: Tensor,
    weight: Tensor | None, epsilon: float, images: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of inputs, weights and biases of a batch normalisation.

    ``out`` are its outputs where they were rectified.
    """
    to_x, to_weight, to_bias = POOL.empty(x.shape), torch.empty_like(mean), torch.empty_like(mean)
    library().normalise_gradient(
        _maps(x, images), *_pointers(x, gradient, out, mean, variance, weight), epsilon,
        *_pointers(to_x, to_weight, to_bias), *threads.team(),
    )  # fmt: skip
    return to_x, to_weight, to_bias


def maxima(x: Tensor, window: Sequence[int]) -> Tensor:
    """Return the maxima over windows: rows and columns of size, stride and padding."""
    blocks, height, channels, width, images = x.shape
    size_y, size_x, stride_y, stride_x, padding_y, padding_x = window
    out_y = (height + 2 * padding_y - size_y) // stride_y + 1
    out_x = (width + 2 * padding_x - size_x) // stride_x + 1
    out = POOL.empty((blocks, out_y, channels, out_x, images))
    struct = WindowStruct(*window, out_y, out_x)
    library().maxima(_maps(x, 0), byref(struct), *_pointers(x, out), *threads.team())
    return out


def maxima_gradient(
    x: Tensor, gradient: Tensor, window: Sequence[int], *, rectified: bool
) -> Tensor:
    """Return the gradient of the inputs of maxima, or of what a ReLU made them of."""
    to_x = POOL.empty(x.shape)
    struct = WindowStruct(*window, gradient.shape[1], gradient.shape[3])
    library().maxima_gradient(
        _maps(x, 0), byref(struct), *_pointers(x, gradient), rectified, pointer(to_x),
        *threads.team(),
    )  # fmt: skip
    return to_x


def _maps(x: Tensor, images: int) -> Any:
    return byref(MapsStruct(*x.shape[:4], images))


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [pointer(tensor) for tensor in tensors]
