"""Steps laid out in memory for one shape of the input: what the compiled kernels run.

The layouts and the meaning of every field are described in ``sparse_network.c``.
"""

import ctypes
import functools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lossprune.deployment.sparse.steps import Shape, Step, Weights, tiles
from lossprune.kernels.compiler import load
from lossprune.pruning.errors import PruningError

SOURCE = Path(__file__).with_name("sparse_network.c")
KINDS = ("convolution", "affine", "addition", "maximum", "mean", "split", "read", "write")
SHARED = 200_000  # multiply-adds: less work than that is not worth waking another thread
_I = ctypes.c_int64
_P = ctypes.c_void_p


class _Map(ctypes.Structure):
    _fields_ = [
        (name, _I)
        for name in ("offset", "plane", "row", "origin", "height", "width", "halo", "channels")
    ]


class _Operation(ctypes.Structure):
    _fields_ = [
        *((name, _I) for name in ("kind", "activation", "pool")),
        *((name, _Map) for name in ("source", "target", "other")),
        *((name, _I) for name in ("height", "width", "stride_y", "stride_x", "size_y", "size_x")),
        *((name, _I) for name in ("tile_y", "tile_x")),
        *((name, _P) for name in ("begin", "offset", "value", "scale", "shift")),
        ("tensor", _I),
    ]


class _Threads(ctypes.Structure):
    _fields_ = [(name, _P) for name in ("parallel", "barrier", "rank", "size")]


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels.

    Raises:
        NoCompiler: they cannot be built here.
    """
    built = load(SOURCE)
    built.run.argtypes = [_P, _I, _P, _I, _I, _P, _I, _I, _I, _P]
    built.run.restype = None
    for name in ("lanes", "operation_bytes"):
        getattr(built, name).restype = _I
    if built.operation_bytes() != ctypes.sizeof(_Operation):
        raise RuntimeError("sparse_network.c and layout.py disagree about an operation")
    return built


@functools.cache
def _threads() -> _Threads | None:
    """Return torch's own pool of threads, or None where it has none that C can call.

    A second pool would fight with torch's for the cores, since each spins while it waits.
    """
    folder = Path(torch.__file__).parent / "lib"
    for file in sorted(folder.glob("libgomp*")):
        pool = ctypes.CDLL(str(file))
        names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
        if all(hasattr(pool, name) for name in names):
            return _Threads(*(ctypes.cast(getattr(pool, name), _P) for name in names))
    return None


@dataclass(frozen=True)
class Plan:
    """Operations in memory; ``run`` may be called by several threads at once."""

    operations: ctypes.Array[_Operation]
    names: tuple[str, ...]
    outputs: tuple[Shape, ...]
    blocked: bool
    room: int
    scratch: int
    work: int
    keep: tuple[Any, ...]
    spaces: deque[Tensor]

    def run(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], shared: int = SHARED
    ) -> None:
        """Read ``inputs`` and fill ``outputs``: contiguous float32 (n, channels, height, width).

        Threads share what is more than ``shared`` multiply-adds.
        """
        images = inputs[0].shape[0]
        self.run_part(0, len(self.operations), inputs, outputs, images, shared)

    def run_part(
        self,
        first: int,
        count: int,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        images: int,
        shared: int = SHARED,
    ) -> None:
        """Run ``count`` operations from the first: for timing them one by one."""
        pool = _threads()
        # Threads that wait for each other cost microseconds; less work than that is one's alone.
        size = torch.get_num_threads() if pool and self.work * images > shared else 1
        pointers = (_P * (len(inputs) + len(outputs)))(
            *(tensor.data_ptr() for tensor in (*inputs, *outputs))
        )
        needed = size * (self.room + self.scratch)
        try:
            space = self.spaces.pop()
        except IndexError:
            space = None
        if space is None or space.numel() < needed:
            space = torch.zeros(needed)
        library().run(
            ctypes.addressof(self.operations) + first * ctypes.sizeof(_Operation), count, pointers,
            images, self.blocked, space.data_ptr(), self.room, self.scratch, size,
            ctypes.addressof(pool) if size > 1 and pool else None,
        )  # fmt: skip
        self.spaces.append(space)


def lay_out(
    steps: Sequence[Step],
    weights: Sequence[Weights],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str],
    *,
    blocked: bool,
) -> Plan:
    """Place every value of ``steps`` in a workspace and every weight's input at its offset.

    Args:
        steps: in order.
        weights: of each step.
        inputs: the shapes of what is read, by name.
        outputs: the names of what is written.
        blocked: whether an element is a block of images, or else one number.
    """
    return _Layout(blocked, inputs, outputs).plan(steps, weights)


class _Layout:
    def __init__(self, blocked: bool, inputs: Mapping[str, Shape], outputs: Sequence[str]) -> None:
        self.blocked = blocked
        self.lanes = library().lanes()
        self.unit = self.lanes if blocked else 1
        self.inputs, self.outputs = dict(inputs), list(outputs)
        self.shapes: dict[str, Shape] = dict(inputs)
        self.halos: dict[str, int] = {}
        self.maps: dict[str, _Map] = {}
        self.keep: list[Any] = []
        self.scratch = self.work = 0

    def plan(self, steps: Sequence[Step], weights: Sequence[Weights]) -> Plan:
        steps, weights = self._split_strides(steps, weights)
        for step, weight in zip(steps, weights, strict=True):
            if step.kind == "affine" and weight.shift.numel() not in (
                0,
                self.shapes[step.source][0],
            ):
                raise PruningError(
                    f"{step.name} takes {weight.shift.numel()} channels, its input has shape "
                    f"{self.shapes[step.source]}"
                )
            self.shapes[step.target] = (
                _split_shape(step, self.shapes[step.source])
                if step.kind == "split"
                else step.output(self.shapes[step.source])
            )
            if step.other is not None:
                _check_addition(step, self.shapes)
        for step, weight in zip(steps, weights, strict=True):
            self._widen_halo(step, weight)
        room = self._place(steps)
        operations = [self._read(k, name) for k, name in enumerate(self.inputs)]
        operations += [
            self._operation(step, weight) for step, weight in zip(steps, weights, strict=True)
        ]
        operations += [
            self._write(k, name) for k, name in enumerate(self.outputs, start=len(self.inputs))
        ]
        names = (*self.inputs, *(step.name for step in steps), *self.outputs)
        return Plan(
            (_Operation * len(operations))(*operations), names,
            tuple(self.shapes[name] for name in self.outputs),
            self.blocked, _whole_lines(room), _whole_lines(self.scratch), self.work,
            tuple(self.keep), deque(),
        )  # fmt: skip

    def _split_strides(
        self, steps: Sequence[Step], weights: Sequence[Weights]
    ) -> tuple[list[Step], list[Weights]]:
        """Put a split before each strided convolution where vectors lie along the positions.

        There a vector is of neighbours, which a stride would tear apart.
        """
        if self.blocked:
            return list(steps), list(weights)
        out: list[tuple[Step, Weights]] = []
        done: set[str] = set()
        for step, weight in zip(steps, weights, strict=True):
            if step.kind == "convolution" and step.stride != (1, 1):
                parts = f"{step.source} by {step.stride[0]}x{step.stride[1]}"
                if parts not in done:
                    done.add(parts)
                    split = Step("split", f"split of {step.name}", step.source, parts)
                    out.append((split.replace(stride=step.stride), weight))
            out.append((step, weight))
        return [step for step, _ in out], [weight for _, weight in out]

    def _taps(self, step: Step, weight: Weights) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
        """Return the map that is read, and output, channel, dy, dx of the weights in it."""
        output, channel, dy, dx = step.taps(weight.positions, self.shapes[step.source])
        sy, sx = step.stride
        if self.blocked or step.stride == (1, 1):
            return step.source, output, channel, dy, dx
        parts = f"{step.source} by {sy}x{sx}"
        channel = (channel * sy + dy % sy) * sx + dx % sx
        return parts, output, channel, dy // sy, dx // sx  # floor, of negative numbers too

    def _used(self, step: Step) -> set[str]:
        used = {step.source, step.target, step.other}
        if step.kind == "convolution" and step.stride != (1, 1) and not self.blocked:
            used.add(f"{step.source} by {step.stride[0]}x{step.stride[1]}")
        return {name for name in used if name is not None}

    def _strides(self, step: Step) -> tuple[int, int]:
        return step.stride if self.blocked else (1, 1)

    def _widen_halo(self, step: Step, weight: Weights) -> None:
        if step.kind != "convolution" or not weight.positions.numel():
            return
        name, _, _, dy, dx = self._taps(step, weight)
        _, height, width = self.shapes[name]
        _, rows, columns = step.convolved(self.shapes[step.source])
        sy, sx = self._strides(step)
        beyond = max(
            0, -int(dy.min()), -int(dx.min()),
            int(dy.max()) + (rows - 1) * sy - (height - 1),
            int(dx.max()) + (columns - 1) * sx - (width - 1),
        )  # fmt: skip
        self.halos[name] = max(self.halos.get(name, 0), beyond)

    def _place(self, steps: Sequence[Step]) -> int:
        """Give every value its place; places are used again when nothing reads them any more."""
        last = {name: len(steps) for name in self.outputs}
        for k, step in enumerate(steps):
            for name in self._used(step):
                last[name] = max(last.get(name, 0), k)
        free: list[tuple[int, int]] = []
        end = 0

        def place(name: str) -> None:
            nonlocal end
            self.maps[name], size = self._map(name)
            for k, (start, length) in enumerate(free):
                if length >= size:
                    free[k : k + 1] = [(start + size, length - size)] if length > size else []
                    break
            else:
                start, end = end, end + size
            self.maps[name].offset = start

        def release(name: str) -> None:
            free.append((self.maps[name].offset, self._map(name)[1]))
            free.sort()
            for k in range(len(free) - 1, 0, -1):
                (a, n), (b, m) = free[k - 1], free[k]
                if a + n == b:
                    free[k - 1 : k + 1] = [(a, n + m)]

        for name in self.inputs:
            place(name)
        for k, step in enumerate(steps):
            place(step.target)
            for name in self._used(step):
                if last[name] == k:
                    release(name)
        # A tile may read one vector per accumulator past the end of the last map.
        return (end + 17 * self.lanes + self._furthest()) * self.unit

    def _furthest(self) -> int:
        return max((m.row * (m.halo + 1) for m in self.maps.values()), default=0)

    def _map(self, name: str) -> tuple[_Map, int]:
        channels, height, width = self.shapes[name]
        halo = self.halos.get(name, 0)
        row = width + halo
        origin = halo * row + halo
        plane = origin + (height + halo) * row
        if not self.blocked and plane > 1:
            plane += self.lanes - 1  # the last vector of the last row may reach past it
        size = -(-channels * plane // 16) * 16
        return _Map(0, plane, row, origin, height, width, halo, channels), size

    def _operation(self, step: Step, weight: Weights) -> _Operation:
        made = _Operation(
            kind=KINDS.index(step.kind), activation=step.activation, pool=step.pool,
            source=self.maps[step.source], target=self.maps[step.target],
            stride_y=step.stride[0], stride_x=step.stride[1],
            size_y=step.size[0], size_x=step.size[1],
        )  # fmt: skip
        if step.other is not None:
            made.other = self.maps[step.other]
        if step.kind == "mean":
            _, made.size_y, made.size_x = self.shapes[step.source]
        if step.kind in ("convolution", "affine"):
            made.shift = self._pointer(weight.shift, torch.float32)
        if step.kind == "affine":
            made.scale = self._pointer(weight.scale, torch.float32)
        if step.kind == "convolution":
            self._convolution(made, step, weight)
        return made

    def _convolution(self, made: _Operation, step: Step, weight: Weights) -> None:
        name, output, channel, dy, dx = self._taps(step, weight)
        source = self.maps[name]
        channels, height, width = step.convolved(self.shapes[step.source])
        made.source = source
        made.stride_y, made.stride_x = self._strides(step)
        offset = (channel * source.plane + dy * source.row + dx) * self.unit
        begin = torch.zeros(channels + 1, dtype=torch.int64)
        begin[1:] = torch.bincount(output, minlength=channels).cumsum(0)
        made.begin = self._pointer(begin, torch.int32)
        made.offset = self._pointer(offset, torch.int32)
        made.value = self._pointer(weight.values, torch.float32)
        # Rows and columns that no window of the maximum takes in are not computed.
        made.height, made.width = (n // step.pool * step.pool for n in (height, width))
        made.tile_y, made.tile_x = self._tile(step)
        line = (made.height - 1) * source.row + made.width
        self.scratch = max(self.scratch, line + 32 * self.lanes)
        self.work += weight.values.numel() * made.height * made.width

    def _tile(self, step: Step) -> tuple[int, int]:
        fitting = tiles(step, self.shapes[step.source])
        return step.tile if step.tile in fitting else fitting[0]

    def _read(self, tensor: int, name: str) -> _Operation:
        made = _Operation(kind=KINDS.index("read"), target=self.maps[name], tensor=tensor)
        made.source = self.maps[name]
        return made

    def _write(self, tensor: int, name: str) -> _Operation:
        made = _Operation(kind=KINDS.index("write"), source=self.maps[name], tensor=tensor)
        made.target = self.maps[name]
        return made

    def _pointer(self, tensor: Tensor, dtype: torch.dtype) -> int:
        if dtype == torch.int32 and tensor.numel() and int(tensor.max()) >= 2**31:
            raise PruningError("an input of this size is too large for the sparse kernels")
        tensor = tensor.detach().to(dtype).contiguous()
        self.keep.append(tensor)
        return tensor.data_ptr()


def _whole_lines(numbers: int) -> int:
    # Each thread's workspace begins with a cache line: a vector across two takes twice as long.
    return -(-numbers // 16) * 16


def _check_addition(step: Step, shapes: Mapping[str, Shape]) -> None:
    """Refuse maps that were alike at the example's size and are not at this one."""
    made = step.convolved(shapes[step.source]) if step.kind == "convolution" else None
    made, other = made or shapes[step.source], shapes[str(step.other)]
    if made != other:
        raise PruningError(
            f"{step.name}: maps of shapes {made} and {other} are added here, "
            "which were of one shape in the example"
        )


def _split_shape(step: Step, source: Shape) -> Shape:
    (sy, sx), (channels, height, width) = step.stride, source
    return channels * sy * sx, -(-height // sy), -(-width // sx)
