"""Where and with what a run computes: device, threads, deterministic algorithms, versions."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import lossprune
from lossprune.experiment.config import RunConfig
from lossprune.experiment.ranks import current, own_device
from lossprune.experiment.record import RunRecord
from lossprune.flags import MOST_THREADS
from lossprune.torch_state import using_threads


def choose_device(name: str, unfinished: RunRecord | None) -> torch.device:
    """Return the device of this process: ``auto`` is where an interrupted run ran, else a GPU.

    Raises:
        ValueError: there is no such device, or there are fewer GPUs than processes.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    if name == "auto":
        ran_on = None if unfinished is None else unfinished.environment.get("device")
        name = "cuda" if available and ran_on != "cpu" else "cpu"
    return own_device(name)


def environment_of(device: torch.device) -> dict[str, Any]:
    """Return the versions and the machine that a computation on ``device`` ran with."""
    import numpy as np

    cuda = device.type == "cuda"
    return {
        "lossprune": lossprune.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": current().world,
    }


@contextmanager
def computing(config: RunConfig, unfinished: RunRecord | None) -> Iterator[None]:
    """Set threads and deterministic algorithms for a run, and put back what was there.

    An interrupted run goes on with as many threads as it had, unless ``--threads`` says otherwise:
    another number may round differently.
    """
    recorded = None if unfinished is None else unfinished.environment.get("threads")
    if not (isinstance(recorded, int) and 1 <= recorded <= MOST_THREADS):
        recorded = None  # a record can say anything
    with using_threads(config.threads or recorded), _deterministic():
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    """Choose deterministic algorithms on a GPU; on a CPU there are no others for what runs here.

    Not on a CPU also because the switch alone makes torch import its compiler, for two seconds.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    filling = deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A kernel more for every tensor; nothing here reads what it has not written.
        deterministic.fill_uninitialized_memory = False
        yield
    finally:
        deterministic.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
