"""torch's own pool of threads, for compiled files to run on.

A second pool would fight with torch's for the cores, since each spins while it waits.
"""

import ctypes
import functools
from pathlib import Path

import torch

_P = ctypes.c_void_p


class ThreadsStruct(ctypes.Structure):
    """``Threads`` of ``lossprune.h``: run a function on all of a team, meet, and who one is."""

    _fields_ = [(name, _P) for name in ("parallel", "barrier", "rank", "size")]


@functools.cache
def pool() -> ThreadsStruct | None:
    """Return torch's pool, or None where it has none that C can call."""
    folder = Path(torch.__file__).parent / "lib"
    for file in sorted(folder.glob("libgomp*")):
        library = ctypes.CDLL(str(file))
        names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
        if all(hasattr(library, name) for name in names):
            return ThreadsStruct(*(ctypes.cast(getattr(library, name), _P) for name in names))
    return None


def team() -> tuple[int, int | None]:
    """Return how many threads torch uses, and where the pool of them is, if there are several."""
    found, size = pool(), torch.get_num_threads()
    return (size, ctypes.addressof(found)) if found and size > 1 else (1, None)
