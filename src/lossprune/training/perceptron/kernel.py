"""The compiled side of sparse training: C structures over tensors, and the calls."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from lossprune.kernels.compiler import load
from lossprune.training.perceptron.structure import GROUP, Survivors

SOURCE = Path(__file__).with_name("sparse_training.c")


class _Layer(Structure):
    _fields_ = (
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("activation", c_int32),
        ("unused", c_int32),
        ("row_start", c_void_p),
        ("column", c_void_p),
        ("column_start", c_void_p),
        ("row", c_void_p),
        ("position", c_void_p),
        ("weight", c_void_p),
        ("weight_velocity", c_void_p),
        ("bias", c_void_p),
        ("bias_velocity", c_void_p),
    )


class _Network(Structure):
    _fields_ = (
        ("layers", c_int32),
        ("blocks", c_int32),
        ("pixels", c_int64),
        ("layer", POINTER(_Layer)),
        ("block", c_void_p),
        ("factor", c_void_p),
        ("offset", c_void_p),
        ("idle_count", c_int64),
        ("idle", c_void_p),
        ("idle_velocity", c_void_p),
    )


class _Descent(Structure):
    _fields_ = (("lr", c_float), ("momentum", c_float), ("decay", c_float))


class Kernel:
    """The C functions on one network; its parameters are copied in and out by the caller.

    Attributes:
        weights, weight_velocities, biases, bias_velocities: float32, one tensor a layer.
        idle, idle_velocity: float32, parameters that only decay.

    Raises:
        NoCompiler: there is no C compiler here.
    """

    def __init__(self, layers: Sequence[Survivors], blocks: Tensor, idle: int) -> None:
        library = load(
            SOURCE,
            flags=("-lm",),
            constants={"GROUP": GROUP},
            structures={"layer": _Layer, "network": _Network, "descent": _Descent},
        )
        self._epoch = library.lossprune_sparse_epoch
        self._evaluate = library.lossprune_sparse_evaluate
        self._epoch.restype = self._evaluate.restype = c_int64
        self.weights = [torch.zeros(len(layer.weights)) for layer in layers]
        self.weight_velocities = [torch.zeros(len(layer.weights)) for layer in layers]
        self.biases = [torch.zeros(len(layer.live)) for layer in layers]
        self.bias_velocities = [torch.zeros(len(layer.live)) for layer in layers]
        self.idle, self.idle_velocity = torch.zeros(idle), torch.zeros(idle)
        self._held: list[object] = []  # what the structures point to
        table = (_Layer * len(layers))()
        inputs = len(blocks) * GROUP
        for number, layer in enumerate(layers):
            self._fill(table[number], number, layer, inputs)
            inputs = len(layer.live)
        self._network = _Network(
            layers=len(layers),
            blocks=len(blocks),
            pixels=layers[0].stage.linear.in_features,
            layer=table,
            block=self._integers(blocks),
            idle_count=idle,
            idle=self.idle.data_ptr(),
            idle_velocity=self.idle_velocity.data_ptr(),
        )

    def normalise(self, factor: Tensor, offset: Tensor) -> None:
        """Set an input to pixel · ``factor`` − ``offset``: float32, a value a pixel."""
        self._normalisation = (factor.contiguous(), offset.contiguous())
        self._network.factor = self._normalisation[0].data_ptr()
        self._network.offset = self._normalisation[1].data_ptr()

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        *,
        batch: int,
        check: int,
        lr: float,
        momentum: float,
        decay: float,
    ) -> tuple[float, int]:
        """Train for one epoch; return the mean loss and the step found not finite, or 0."""
        mean = c_double()
        failed = self._epoch(
            byref(self._network),
            c_void_p(images.data_ptr()),
            c_void_p(labels.data_ptr()),
            c_void_p(order.data_ptr()),
            c_int64(len(order)),
            c_int64(batch),
            c_int64(check),
            _Descent(lr, momentum, decay),
            byref(mean),
        )
        _check_memory(failed)
        return mean.value, failed

    def evaluate(self, images: Tensor, labels: Tensor, first: int, count: int) -> tuple[float, int]:
        """Return the summed loss and the number of errors of ``count`` examples."""
        loss, wrong = c_double(), c_int64()
        failed = self._evaluate(
            byref(self._network),
            c_void_p(images.data_ptr()),
            c_void_p(labels.data_ptr()),
            c_int64(first),
            c_int64(count),
            byref(loss),
            byref(wrong),
        )
        _check_memory(failed)
        return loss.value, wrong.value

    def _fill(self, entry: _Layer, number: int, layer: Survivors, inputs: int) -> None:
        outputs = len(layer.live)
        row = torch.repeat_interleave(torch.arange(outputs), layer.rows.diff())
        by_input = torch.argsort(layer.columns, stable=True)
        counts = torch.bincount(layer.columns, minlength=inputs)
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        entry.outputs, entry.inputs = outputs, inputs
        entry.activation = layer.stage.activation
        entry.row_start = self._integers(layer.rows)
        entry.column = self._integers(layer.columns)
        entry.column_start = self._integers(starts)
        entry.row = self._integers(row[by_input])
        entry.position = self._integers(by_input)
        entry.weight = self.weights[number].data_ptr()
        entry.weight_velocity = self.weight_velocities[number].data_ptr()
        if layer.stage.linear.bias is not None:
            entry.bias = self.biases[number].data_ptr()
            entry.bias_velocity = self.bias_velocities[number].data_ptr()

    def _integers(self, values: Tensor) -> int:
        array = values.to(torch.int32).contiguous()
        self._held.append(array)
        return array.data_ptr()


def _check_memory(failed: int) -> None:
    if failed == ctypes.c_int64(-1).value:
        raise MemoryError("no memory for the activations of one batch")
