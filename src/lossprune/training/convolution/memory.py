"""Memory for activations that is kept, in large pages, instead of being returned and asked for.

What torch frees of many megabytes goes back to the system, which gives it again page by page, at a
cost as large as that of computing what is in it; and the channels of a map lie so far apart that
small pages have to be looked up for each.
"""

import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20
_SMALL = 1 << 20  # bytes below which torch's own allocator is as good


class Pool:
    """Buffers that are free, by their size in bytes."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Return a float32 tensor; its memory comes back here when nothing refers to it."""
        count = math.prod(shape)
        size = count * 4
        if size < _SMALL:
            return torch.empty(shape, dtype=torch.float32, device="cpu")
        size = math.ceil(size / _SMALL) * _SMALL
        buffers = self._free[size]
        try:
            buffer = buffers.pop()
        except IndexError:
            buffer = _new(size)
        lent = buffer[:count]
        weakref.finalize(lent, buffers.append, buffer)
        return torch.from_numpy(lent).view(*shape)


def _new(size: int) -> np.ndarray:
    mapped = mmap.mmap(-1, size + _LARGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(mapped, np.uint8)
    start = -buffer.ctypes.data % _LARGE_PAGE
    return buffer[start : start + size].view(np.float32)


POOL = Pool()
