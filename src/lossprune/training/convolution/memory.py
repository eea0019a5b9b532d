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
from threading import RLock

import numpy as np
import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20
_SMALL = 1 << 20  # bytes below which torch's own allocator is as good


class Pool:
    """Buffers that are free, by their size in bytes; with those in use twice the most that were.

    To forget more would be to ask the system for it again at the next step.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._lent = self._unused = self._most = 0  # bytes
        self._lock = RLock()  # a buffer may come back in the middle of anything, on any thread

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Return a float32 tensor; its memory comes back here when nothing refers to it."""
        count = math.prod(shape)
        size = count * 4
        if size < _SMALL:
            return torch.empty(shape, dtype=torch.float32, device="cpu")
        size = math.ceil(size / _SMALL) * _SMALL
        with self._lock:
            buffers = self._free.pop(size, [])  # and to the end: used last
            if buffers:
                buffer = buffers.pop()
                self._unused -= size
                self._free[size] = buffers
            else:
                self._forget(size)
                buffer = _new(size)
            self._lent += size
            self._most = max(self._most, self._lent)
        lent = buffer[:count]
        weakref.finalize(lent, self._back, buffer)
        return torch.from_numpy(lent).view(*shape)

    def _back(self, buffer: np.ndarray) -> None:
        with self._lock:
            self._lent -= buffer.nbytes
            self._unused += buffer.nbytes
            self._free[buffer.nbytes].append(buffer)

    def _forget(self, wanted: int) -> None:
        """Give back buffers of the sizes not used for longest, until there is room for another."""
        for size in list(self._free):
            while self._free[size] and self._unused + self._lent + wanted > 2 * self._most:
                self._free[size].pop()
                self._unused -= size


def _new(size: int) -> np.ndarray:
    mapped = mmap.mmap(-1, size + _LARGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(mapped, np.uint8)
    start = -buffer.ctypes.data % _LARGE_PAGE
    return buffer[start : start + size].view(np.float32)


POOL = Pool()
