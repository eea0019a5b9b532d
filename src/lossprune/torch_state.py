"""The state of torch in this process, changed for a while and put back; the cores it may use.

torch is imported where it is used: records are read without it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
def in_full_float32() -> Iterator[None]:
    """Let products and convolutions of float32 keep all its digits, and put back what was there.

    By default torch rounds the inputs of convolutions on a GPU to 10 bits (TF32), and where it is
    told to, those of products, and on some CPUs to 7 (bfloat16).  Not by ``cudnn.flags``: whatever
    is not given to it, cuDNN itself among it, it switches off.
    """
    import torch

    backends: Any = torch.backends  # whose parts it does not declare
    if hasattr(backends.cudnn, "conv"):  # since torch 2.9, where the older switches may raise
        places = (
            backends.cudnn.conv,
            backends.cudnn.rnn,
            backends.cuda.matmul,
            backends.mkldnn.conv,
            backends.mkldnn.rnn,
            backends.mkldnn.matmul,
        )
        switch, full = "fp32_precision", "ieee"
    else:
        places = backends.cudnn, backends.cuda.matmul
        switch, full = "allow_tf32", False
    before = [getattr(place, switch) for place in places]
    try:
        for place in places:
            setattr(place, switch, full)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, switch, value)


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
