"""The state of torch in this process, changed for a while and put back; the cores it may use.

torch is imported where it is used: records are read without it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def in_mode(network: "nn.Module", *, training: bool) -> Iterator[None]:
    """Put a network in training or evaluation mode, and every module back into its own."""
    modes = {module: module.training for module in network.modules()}
    network.train() if training else network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Let torch use so many threads, or its own choice, and put back what was there."""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators, and put back what was there."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def usable_cores() -> list[int] | None:
    """Return the CPUs that this process may use; None where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def count_cores() -> int:
    """Return how many CPUs this process may use."""
    cores = usable_cores()
    return len(cores) if cores is not None else os.cpu_count() or 1
