"""The compiled kernels of ``sparse_network.c``, the structs that they read, and a plan to run."""

import contextlib
import ctypes
import dataclasses
import enum
import functools
import mmap
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lossprune.deployment.sparse.placing import FeatureMap
from lossprune.deployment.sparse.steps import Pair, Shape
from lossprune.deployment.sparse.token_steps import together
from lossprune.kernels import threads
from lossprune.kernels.compiler import load
from lossprune.kernels.threads import ThreadsStruct

SOURCE = Path(__file__).with_name("sparse_network.c")
# Vectors of rows for which a linear layer's kept weight is loaded once: with its broadcast they fit
# the registers of every machine.
ROW_VECTORS = 8
SHARED = 200_000  # multiply-adds: less work than that is not worth waking another thread
_LARGE_PAGE = 2 << 20  # bytes
_I = ctypes.c_int64
_P = ctypes.c_void_p


class OperationKind(enum.IntEnum):
    """The operations, as the kernels know them."""

    CONVOLUTION = 0
    AFFINE = 1
    ADDITION = 2
    MAXIMUM = 3
    MEAN = 4
    SPLIT = 5
    READ = 6
    WRITE = 7
    DIFFERENCE = 8
    PRODUCT = 9
    JOIN = 10
    NORM = 11
    ROOT_NORM = 12
    ATTENTION = 13
    TOKEN = 14
    TOKEN_MEAN = 15
    TOKEN_SHIFT = 16
    PATCHES = 17
    NOTHING = 18


# Macros of the kernels.
CONSTANTS = {**OperationKind.__members__, "ROW_VECTORS": ROW_VECTORS}


class MapStruct(ctypes.Structure):
    """``Map``: where a value lies."""

    _fields_ = [(name, _I) for name in FeatureMap._fields]


class OperationStruct(ctypes.Structure):
    """``Operation``: its fields are explained in ``sparse_network.c``."""

    _fields_ = [
        *((name, _I) for name in ("kind", "activation")),
        *((name, ctypes.c_float) for name in ("low", "high")),
        ("pool", _I),
        *((name, MapStruct) for name in ("source", "target", "other")),
        ("spread", _I),
        *((name, _I) for name in ("height", "width", "stride_y", "stride_x")),
        *((name, _I) for name in ("tile_y", "tile_x", "chunks", "alike")),
        *((name, _P) for name in ("total", "visit", "begin", "offset", "value")),
        *((name, _P) for name in ("scale", "shift", "window")),
        ("tensor", _I),
        ("third", MapStruct),
        ("bias", MapStruct),
        *((name, _I) for name in ("single", "heads", "key_heads", "size", "value_size")),
        *((name, _I) for name in ("query", "key", "values", "causal", "place")),
        ("number", ctypes.c_double),
    ]


_OPERATION = ctypes.sizeof(OperationStruct)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels.

    Raises:
        NoCompiler: they cannot be built here.
    """
    built = load(
        SOURCE,
        constants=CONSTANTS,
        structures={"Map": MapStruct, "Operation": OperationStruct, "Threads": ThreadsStruct},
    )
    built.run.argtypes = [_P, _I, _P, _I, _I, _I, _I, _P, _I, _I, _I, _P]
    built.run.restype = None
    built.lanes.restype = _I
    return built


def lanes() -> int:
    """Return how many images a block has on this machine."""
    return library().lanes()


class Extent(NamedTuple):
    """How much a plan computes at once.

    Attributes:
        tokens: of an example; 1 where there are none.
        together: images, or examples, of a block.
        maps: numbers in a thread's workspace for the maps.
        scratch: numbers in it for sums.
        numbers: of both.
    """

    tokens: int
    together: int
    maps: int
    scratch: int
    numbers: int


def _workspace(numbers: int) -> Tensor:
    """Return so many zeros, in large pages where there are such: maps are read all over."""
    size = numbers * torch.float32.itemsize
    if size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(numbers)
    memory = mmap.mmap(-1, size + _LARGE_PAGE)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    space = torch.frombuffer(memory, dtype=torch.float32)
    begin = -space.data_ptr() % _LARGE_PAGE // torch.float32.itemsize
    return space[begin : begin + numbers]


@dataclass(frozen=True)
class SparsePlan:
    """Operations in memory; ``run`` may be called by several threads at once.

    Attributes:
        operations: first those that read an input each, last those that write an output each.
        outputs: their shapes.
        single: the values that have one row an example, where others have one a token.
        vectors: of which an element is: of as many images, or rows, as they have numbers; 0: an
            element is one number.
        element: how many images, or rows, it holds.
        tokens: whether images are examples of rows, (n, tokens, features).
        patches: how many tokens each has where they are patches of images; else 0.
        room: numbers in a thread's workspace for the maps of a block, or piece of it.
        scratch: numbers in it for a line of sums.
        token_scratch: more of these for each token of an example.
        work: multiply-adds of an image, or a row.
        keep: what the operations point to.
        spaces: workspaces that no call uses now.
        extents: what is computed at once, by the tokens of an example; as calls have asked.
    """

    operations: ctypes.Array[OperationStruct]
    outputs: tuple[Shape, ...]
    single: frozenset[str]
    vectors: int
    element: int
    tokens: bool
    patches: int
    room: int
    scratch: int
    token_scratch: int
    work: int
    keep: tuple[Tensor, ...]
    spaces: deque[Tensor]
    extents: dict[int, Extent] = field(default_factory=dict)

    def run(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        shared: int = SHARED,
        only: int | None = None,
    ) -> None:
        """Read ``inputs`` and fill ``outputs``: contiguous float32 (n, channels, height, width).

        Threads share what is more than ``shared`` multiply-adds.  For timing operations one by one,
        ``only`` that one is run.
        """
        # Small networks take fifteen microseconds in all: what can be known before a call is.
        first, count = (0, len(self.operations)) if only is None else (only, 1)
        images = inputs[0].shape[0]
        extent = self.extent(self.count(inputs))
        # Threads that wait for each other cost microseconds; less work than that is one's alone.
        size, pool = torch.get_num_threads(), None
        if size > 1 and (self.amount(inputs) <= shared or (pool := threads.pool()) is None):
            size = 1
        pointers = (_P * (len(inputs) + len(outputs)))(
            *[tensor.data_ptr() for tensor in (*inputs, *outputs)]
        )
        try:
            space = self.spaces.pop()
        except IndexError:
            space = None
        if space is None or space.numel() < size * extent.numbers:
            space = _workspace(size * extent.numbers)
        library().run(
            self._address + first * _OPERATION, count, pointers, images, extent.tokens,
            extent.together, self.vectors, space.data_ptr(), self.room, extent.scratch, size,
            ctypes.addressof(pool) if pool else None,
        )  # fmt: skip
        self.spaces.append(space)

    @functools.cached_property
    def _address(self) -> int:
        return ctypes.addressof(self.operations)

    def amount(self, inputs: Sequence[Tensor]) -> int:
        """Return the multiply-adds of a call."""
        return self.work * inputs[0].shape[0] * self.count(inputs)

    def count(self, inputs: Sequence[Tensor]) -> int:
        """Return how many tokens an example has; 1 where there are none."""
        return self.patches or inputs[0].shape[1] if self.tokens else 1

    def extent(self, tokens: int) -> Extent:
        """Return how much is computed at once, of examples of so many tokens; 1 of images."""
        if tokens not in self.extents:
            count = together(tokens, self.element)
            scratch = self.scratch + tokens * self.token_scratch
            pieces = -(-count * tokens // self.element) if self.vectors > 1 else 1
            maps = pieces * self.room
            self.extents[tokens] = Extent(tokens, count, maps, scratch, maps + scratch)
        return self.extents[tokens]

    def with_tile(self, index: int, tile: Pair) -> "SparsePlan":
        """Return the same with another tile for one operation; the two share memory."""
        operations = type(self.operations).from_buffer_copy(self.operations)
        operations[index].tile_y, operations[index].tile_x = tile
        return dataclasses.replace(self, operations=operations)
