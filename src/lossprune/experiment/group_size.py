"""How many runs are trained together: as many as fit in memory."""

import os
from pathlib import Path

import torch

from lossprune.experiment.runner import OpenRun
from lossprune.torch_state import usable_cores
from lossprune.training import bytes_per_member

_OF_GPU = 0.8  # of what is free: libraries take workspaces that nobody can foresee
_OF_MEMORY = 0.5  # of what is available to this process's share of the cores
_OTHER_FILES = 100  # that a process has open beside a lock for each run
_UNKNOWN = 4 << 30


def most_together(run: OpenRun) -> int:
    """Return how many runs like this one can be trained together on its device; at least one."""
    state = run.state
    weights = sum(w.numel() * w.element_size() for w in state.network.state_dict().values())
    each = bytes_per_member(state.network, state.dataset, state.config.batch_size)
    room = _on_gpu(state.device) if state.device.type == "cuda" else _in_memory()
    # Each keeps a copy of its best network, too.
    return max(1, min(int(room) // (each + weights), _open_files()))


def _on_gpu(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + own) * _OF_GPU


def _in_memory() -> float:
    """A share of what is available, so that every worker of a machine can take its own."""
    cores, own = os.cpu_count() or 1, len(usable_cores() or [0])
    return min(_available(), _left_to_group()) * _OF_MEMORY * own / cores


def _available() -> float:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return _UNKNOWN


def _left_to_group() -> float:
    """What the control group of this process, such as a container or a Slurm job, has left."""
    folder = Path("/sys/fs/cgroup")
    try:
        used = int((folder / "memory.current").read_text())
        return max(0, int((folder / "memory.max").read_text()) - used)
    except (OSError, ValueError):
        return float("inf")


def _open_files() -> int:
    try:
        import resource
    except ImportError:  # not on this system
        return 400
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10**6 if soft == resource.RLIM_INFINITY else max(1, soft - _OTHER_FILES)
