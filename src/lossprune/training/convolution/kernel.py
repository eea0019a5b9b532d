"""The compiled side: structures over tensors, and the calls."""

import ctypes
import functools
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from lossprune.kernels import threads
from lossprune.kernels.compiler import load
from lossprune.kernels.threads import ThreadsStruct
from lossprune.pruning.errors import PruningError

SOURCE = Path(__file__).with_name("sparse_convolution.c")
# Rows and vectors in a row of the tiles that there are kernels for.
KERNELS = (
    (1, 1), (1, 2), (1, 4), (1, 7), (1, 8), (1, 14), (1, 16), (2, 2), (2, 4), (2, 7), (2, 8),
    (4, 2), (4, 4),
)  # fmt: skip


class PassStruct(ctypes.Structure):
    """``Pass``: its fields are explained in ``sparse_convolution.c``."""

    _fields_ = [
        *((name, c_int64) for name in ("chunks", "parts", "outputs")),
        *((name, c_int64) for name in ("tile_y", "tile_x", "blocks")),
        *((name, c_int64) for name in ("origin_y", "origin_x", "count_y", "count_x")),
        *((name, c_int64) for name in ("step_y", "step_x", "from_y", "from_x")),
        *((name, c_int64) for name in ("stride_y", "stride_x", "patch_y", "patch_x")),
        *((name, c_int64) for name in ("room", "entry")),
        *((name, c_void_p) for name in ("first", "part", "visit", "output", "begin", "offset")),
    ]


class ShapeStruct(ctypes.Structure):
    """``Shape``: of what the passes read and write."""

    _fields_ = [
        (name, c_int64)
        for name in ("blocks", "height", "channels", "width", "out_height", "outputs", "out_width")
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels.

    Raises:
        NoCompiler: they cannot be built here.
    """
    structures = {"Pass": PassStruct, "Shape": ShapeStruct, "Threads": ThreadsStruct}
    built = load(SOURCE, structures=structures)
    passes, pointer, team = (c_void_p, c_int64), c_void_p, (c_int64, c_void_p)
    built.convolve.argtypes = [*passes, *(pointer,) * 5, c_int64, pointer, pointer, *team]
    built.correlate_weights.argtypes = [*passes, *(pointer,) * 6, *team]
    for name in ("lanes", "convolve", "correlate_weights"):
        getattr(built, name).restype = c_int64
    return built


@functools.cache
def lanes() -> int:
    """Return how many images a block has on this machine."""
    return library().lanes()


def pointer(tensor: Tensor | None) -> int | None:
    """Return where the numbers of a tensor are, for C, which takes them as they must be."""
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise PruningError(
            f"sparse training is in float32 on the CPU, not {tensor.dtype} on {tensor.device}"
        )
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def convolve(
    passes: ctypes.Array[PassStruct], value: Tensor, source: Tensor, gate: Tensor | None,
    bias: Tensor | None, out: Tensor, *, relu: bool = False, out_gate: Tensor | None = None
) -> None:  # fmt: skip
    """Fill ``out`` with the sums of all passes over ``source``; see ``sparse_convolution.c``.

    ``gate``, like the source, and ``out_gate``, like ``out``, set these to 0 where not positive.
    """
    shape = ShapeStruct(*source.shape[:4], *out.shape[1:4])
    _check(library().convolve(
        passes, len(passes), ctypes.byref(shape), pointer(source), pointer(gate),
        pointer(value), pointer(bias), relu, pointer(out_gate), pointer(out),
        *threads.team(),
    ))  # fmt: skip


def correlate_weights(
    passes: ctypes.Array[PassStruct], source: Tensor, gate: Tensor | None, out_gradient: Tensor,
    gradient: Tensor, bias_gradient: Tensor | None
) -> None:  # fmt: skip
    """Add to ``gradient`` that of every entry, and to ``bias_gradient`` that of every output."""
    shape = ShapeStruct(*source.shape[:4], *out_gradient.shape[1:4])
    _check(library().correlate_weights(
        passes, len(passes), ctypes.byref(shape), pointer(source), pointer(gate),
        pointer(out_gradient), pointer(gradient), pointer(bias_gradient), *threads.team(),
    ))  # fmt: skip


def _check(failed: int) -> None:
    if failed == -2:
        raise MemoryError("no memory for the patches of a sparse convolution")
    assert not failed, "a tile without a kernel"
