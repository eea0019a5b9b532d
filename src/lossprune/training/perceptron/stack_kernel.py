"""The compiled side of sparse stacks: structures over tensors, and the calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import Structure, c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossprune.kernels import cuda
from lossprune.kernels.interface import macros
from lossprune.training.loop import CHECK_EVERY
from lossprune.training.perceptron.stack_layout import (
    TOGETHER,
    WORD,
    LayerHeader,
    StackExamples,
    StackLayout,
)
from lossprune.training.perceptron.structure import NotSparseError

SOURCE = Path(__file__).with_name("sparse_stack.cu")
PANEL = 128  # examples that are computed together, at most
_CHUNK = 2560  # examples of an evaluation that one block takes
_PARTS = 8  # of an epoch, where there are more networks than blocks at work at a time
_FLOATS = 4
_NUMBERS = {"EACH": WORD, "PANEL": PANEL, "TOGETHER": TOGETHER}


@dataclass(frozen=True)
class StackMachine:
    """Where the kernels run.

    Attributes:
        load: compiles the file with these macros.
        shared_bytes: shared memory that a block may have.
        blocks: that are at work at a time.
        threads: of a block, 128 to 1024.
    """

    load: Callable[[Sequence[tuple[str, int]]], cuda.CudaFile]
    shared_bytes: int
    blocks: int
    threads: int = 1024


def gpu(device: torch.device) -> StackMachine:
    """Return a GPU as a machine."""
    properties = torch.cuda.get_device_properties(device)

    def load(defines: Sequence[tuple[str, int]]) -> cuda.CudaFile:
        with torch.cuda.device(device):
            return cuda.load(SOURCE, defines=defines)

    return StackMachine(
        load, properties.shared_memory_per_block_optin, properties.multi_processor_count
    )


class _StackPlace(Structure):
    _fields_ = tuple(
        (name, c_longlong)
        for name in ("integers", "integer_count", "values", "value_count", "idle", "idle_count")
    )


class _StackData(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("images", "labels", "affine")),
        *((name, c_int) for name in ("pixels", "words", "parts")),
    )


class _StackDescent(Structure):
    _fields_ = (("rates", c_void_p), ("decays", c_void_p), ("momentum", c_float))


_STRUCTURES = {
    "Layer": LayerHeader,
    "Place": _StackPlace,
    "Data": _StackData,
    "Descent": _StackDescent,
}


class StackKernel:
    """The networks of a stack on the device.

    Attributes:
        values, velocities: float32, of all networks one after the other.
        idle, idle_velocities: likewise, of parameters that only decay.

    Raises:
        NotSparseError: a network has more surviving weights than shared memory has room for.
        NoCudaCompiler: the file cannot be compiled here.
    """

    def __init__(
        self, layouts: Sequence[StackLayout], layers: int, channels: int, device: torch.device,
        machine: StackMachine,
    ) -> None:  # fmt: skip
        self._machine, self._device, self._layouts = machine, device, layouts
        self._fixed = max(_bytes(layout, training=True) for layout in layouts)
        self._units = max(layout.units for layout in layouts)
        if self._fixed > machine.shared_bytes:
            raise NotSparseError(
                f"its surviving weights take {self._fixed:,} bytes of shared memory, which has "
                f"{machine.shared_bytes:,}"
            )
        self._constants = {**_NUMBERS, "LAYERS": layers, "CHANNELS": channels}
        with self._on_device():
            self._load(in_shared=True)  # so that its errors come now
        counts = torch.tensor([layout.sizes for layout in layouts])
        self.starts = counts.cumsum(0) - counts
        self._places = torch.stack((self.starts, counts), 2).flatten(1).to(device)
        self._integers = torch.cat([layout.integers for layout in layouts]).to(device)
        self.values, self.idle = (
            torch.zeros(int(counts[:, kind].sum()), device=device) for kind in (1, 2)
        )
        self.velocities, self.idle_velocities = map(torch.zeros_like, (self.values, self.idle))

    def epoch(
        self,
        members: Sequence[int],
        groups: Sequence[int],
        parts: StackExamples,
        *,
        batch: int,
        rates: Sequence[float],
        decays: Sequence[float],
        momentum: float,
    ) -> tuple[Tensor, Tensor]:
        """Train ``members`` for an epoch, each on the examples of its group.

        Returns:
            On the device, for each: the sum of all losses on the way, float64; and the step found
            not finite, or 0, int32.
        """
        totals = torch.zeros(len(members), dtype=torch.float64, device=self._device)
        bad = torch.zeros(len(members), dtype=torch.int32, device=self._device)
        settings = [
            torch.tensor(values, device=self._device).to(torch.float32)
            for values in (rates, decays)
        ]
        count, at_once = len(members), self._machine.blocks
        pieces = 1 if count <= at_once else _PARTS
        blocks = min(count, 2 * at_once)  # two of small networks may share a multiprocessor
        progress = torch.zeros(1 + count, dtype=torch.int32, device=self._device)
        shared, scratch, room = self._room(self._fixed, parts, blocks)
        self._launch(
            "lossprune_stack_epoch", (blocks, 1), shared, scratch is None,
            [
                self._places, self._whole(members), self._whole(groups), self._integers,
                self.values, self.velocities, self.idle, self.idle_velocities, _data(parts),
                _StackDescent(*map(Tensor.data_ptr, settings), momentum),
                c_longlong(parts.examples), c_int(batch), c_int(CHECK_EVERY), c_int(count),
                c_int(pieces), progress, scratch, c_longlong(room), totals, bad,
            ],
        )  # fmt: skip
        return totals, bad

    def evaluate(
        self, members: Sequence[int], groups: Sequence[int], parts: StackExamples
    ) -> tuple[Tensor, Tensor]:
        """Return, on the device, each member's sum of losses (float64) and number of errors."""
        chunk = max(1, _CHUNK // parts.images.shape[3])
        chunks = -(-parts.images.shape[1] // chunk)
        shape = (len(members), chunks)
        losses = torch.zeros(shape, dtype=torch.float64, device=self._device)
        wrongs = torch.zeros(shape, dtype=torch.int32, device=self._device)
        fixed = max(_bytes(layout, training=False) for layout in self._layouts)
        shared, scratch, room = self._room(fixed, parts, len(members) * chunks)
        self._launch(
            "lossprune_stack_evaluate", (chunks, len(members)), shared, scratch is None,
            [
                self._places, self._whole(members), self._whole(groups), self._integers,
                self.values, _data(parts), c_longlong(parts.examples), c_int(chunk),
                scratch, c_longlong(room), losses, wrongs,
            ],
        )  # fmt: skip
        return losses.sum(1), wrongs.sum(1)

    def panel(self) -> int:
        """Return how many examples of an evaluation are best computed together."""
        fixed = max(_bytes(layout, training=False) for layout in self._layouts)
        fits = (self._machine.shared_bytes - fixed) // (4 * self._units)
        return max(32, min(PANEL, fits // 32 * 32))

    def _room(
        self, fixed: int, parts: StackExamples, blocks: int
    ) -> tuple[int, Tensor | None, int]:
        """Return the bytes of shared memory, and memory for activations that do not fit there."""
        numbers = self._units * min(parts.images.shape[3], PANEL)
        if fixed + 4 * numbers <= self._machine.shared_bytes:
            return fixed + 4 * numbers, None, 0
        return fixed, torch.empty(blocks * numbers, device=self._device), numbers

    def _launch(
        self, name: str, grid: tuple[int, int], shared: int, inside: bool, arguments: list[Any]
    ) -> None:
        with self._on_device():
            file = self._load(in_shared=inside)
            values = list(map(_argument, arguments))
            file.launch(name, grid, self._machine.threads, shared, values)

    def _load(self, *, in_shared: bool) -> cuda.CudaFile:
        constants = {**self._constants, "IN_SHARED": int(in_shared)}
        return self._machine.load(tuple(macros(constants, _STRUCTURES).items()))

    def _on_device(self) -> AbstractContextManager[object]:
        on_gpu = self._device.type == "cuda"
        return torch.cuda.device(self._device) if on_gpu else nullcontext()

    def _whole(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self._device)


def _bytes(layout: StackLayout, *, training: bool) -> int:
    """What a network takes of shared memory beside its activations, which begin at 16 bytes."""
    integers, values, _ = layout.sizes
    numbers = _FLOATS + integers + values * (2 if training else 1) + PANEL + layout.first
    return 4 * (-(-numbers // _FLOATS) * _FLOATS)


def _data(parts: StackExamples) -> _StackData:
    _, count, pixels, row = parts.images.shape
    pointers = map(Tensor.data_ptr, (parts.images, parts.labels, parts.affine))
    return _StackData(*pointers, pixels, row // WORD, count)


def _argument(value: Any) -> Any:
    """A tensor, or None, as a pointer; what is of ctypes as it is."""
    if value is None or isinstance(value, Tensor):
        return c_void_p(0 if value is None else value.data_ptr())
    return value
