"""The compiled side of sparse training: C structures over tensors, and the calls."""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossprune.data import Split
from lossprune.kernels.compiler import load
from lossprune.training.loop import CHECK_EVERY
from lossprune.training.perceptron.structure import GROUP, Survivors, by_input

SOURCE = Path(__file__).with_name("sparse_training.c")


class _KernelLayer(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("outputs", "inputs", "activation", "unused")),
        *((name, c_void_p) for name in ("row_start", "column", "column_start", "row", "position")),
        *((name, c_void_p) for name in ("weight", "weight_velocity", "bias", "bias_velocity")),
    )


class _KernelNetwork(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("layers", "blocks")),
        ("pixels", c_int64),
        ("layer", POINTER(_KernelLayer)),
        *((name, c_void_p) for name in ("block", "factor", "offset")),
        ("idle_count", c_int64),
        *((name, c_void_p) for name in ("idle", "idle_velocity")),
    )


class _KernelDescent(Structure):
    _fields_ = (("lr", c_float), ("momentum", c_float), ("decay", c_float))


_STRUCTURES = {"layer": _KernelLayer, "network": _KernelNetwork, "descent": _KernelDescent}
Pair = tuple[Tensor, Tensor]  # float32, such as some parameters and their velocities


class SparseKernel:
    """The C functions on one network; its parameters are copied in and out by the caller.

    Args:
        survivors: of each layer.
        blocks: the first pixels of the blocks that are read.
        idle: how many parameters only decay.
        normalisation: factor and offset, float32, a value a pixel: an input is
            pixel · factor − offset.

    Attributes:
        weights, biases: of each layer.
        idle: those that only decay.

    Raises:
        NoCompiler: there is no C compiler here.
    """

    def __init__(
        self, survivors: Sequence[Survivors], blocks: Tensor, idle: int, normalisation: Pair
    ) -> None:
        library = load(SOURCE, flags=("-lm",), constants={"GROUP": GROUP}, structures=_STRUCTURES)
        self._epoch = library.lossprune_sparse_epoch
        self._evaluate = library.lossprune_sparse_evaluate
        self._epoch.restype = self._evaluate.restype = c_int64
        self.weights = [_zeros(len(kept.weights)) for kept in survivors]
        self.biases = [_zeros(len(kept.live)) for kept in survivors]
        self.idle = _zeros(idle)
        self._pointed_to: list[Tensor] = []
        layers = (_KernelLayer * len(survivors))()
        inputs = len(blocks) * GROUP
        for number, kept in enumerate(survivors):
            self._fill(layers[number], number, kept, inputs)
            inputs = len(kept.live)
        self._network = _KernelNetwork(
            layers=len(layers),
            blocks=len(blocks),
            pixels=survivors[0].layer.linear.in_features,
            layer=layers,
            block=self._integers(blocks),
            factor=self._kept(normalisation[0]),
            offset=self._kept(normalisation[1]),
            idle_count=idle,
            idle=self.idle[0].data_ptr(),
            idle_velocity=self.idle[1].data_ptr(),
        )

    def epoch(
        self, split: Split, order: Tensor, batch: int, descent: Mapping[str, Any]
    ) -> tuple[float, int]:
        """Train for one epoch; return the mean loss and the step found not finite, or 0.

        ``descent`` is the optimizer's group of parameters.
        """
        images, labels = split.images.contiguous(), split.labels.contiguous()
        settings = (float(descent[name]) for name in ("lr", "momentum", "weight_decay"))
        mean = c_double()
        failed = self._epoch(
            byref(self._network), *map(_pointer, (images, labels, order)), c_int64(len(order)),
            c_int64(batch), c_int64(CHECK_EVERY), _KernelDescent(*settings), byref(mean),
        )  # fmt: skip
        _check_memory(failed)
        return mean.value, failed

    def evaluate(self, images: Tensor, labels: Tensor, first: int, count: int) -> tuple[float, int]:
        """Return the summed loss and the number of errors of ``count`` examples."""
        loss, wrong = c_double(), c_int64()
        failed = self._evaluate(
            byref(self._network), *map(_pointer, (images, labels)), c_int64(first), c_int64(count),
            byref(loss), byref(wrong),
        )  # fmt: skip
        _check_memory(failed)
        return loss.value, wrong.value

    def _fill(self, entry: _KernelLayer, number: int, kept: Survivors, inputs: int) -> None:
        outputs = len(kept.live)
        row = torch.repeat_interleave(torch.arange(outputs), kept.rows.diff())
        column_start, order = by_input(kept.columns, inputs)
        entry.outputs, entry.inputs = outputs, inputs
        entry.activation = kept.layer.activation
        entry.row_start = self._integers(kept.rows)
        entry.column = self._integers(kept.columns)
        entry.column_start = self._integers(column_start)
        entry.row = self._integers(row[order])
        entry.position = self._integers(order)
        entry.weight, entry.weight_velocity = map(Tensor.data_ptr, self.weights[number])
        if kept.layer.linear.bias is not None:
            entry.bias, entry.bias_velocity = map(Tensor.data_ptr, self.biases[number])

    def _integers(self, values: Tensor) -> int:
        return self._kept(values.to(torch.int32))

    def _kept(self, values: Tensor) -> int:
        self._pointed_to.append(values.contiguous())
        return self._pointed_to[-1].data_ptr()


def _zeros(count: int) -> Pair:
    return torch.zeros(count), torch.zeros(count)


def _pointer(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _check_memory(failed: int) -> None:
    if failed == ctypes.c_int64(-1).value:
        raise MemoryError("no memory for the activations of one batch")
