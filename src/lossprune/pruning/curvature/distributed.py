"""Measuring with several processes: who takes which examples, and how the sums come together."""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.errors import PruningError

# What samplers and data sets of one process of many say of themselves: torch's and Lightning's
# samplers by the first pair, Accelerate's by the second.
_PARTS = (("num_replicas", "rank"), ("num_processes", "process_index"))
_SAMPLE = 4096  # entries of a tensor that tell whether another is the same


def processes() -> int:
    """Return how many processes measure together: 1 without an initialised group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this process is, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def part_of(count: int) -> slice:
    """Return this process's part of so many: contiguous, the parts of near-equal size."""
    if processes() == 1:
        return slice(0, count)
    world, rank = dist.get_world_size(), dist.get_rank()
    return slice(count * rank // world, count * (rank + 1) // world)


def share(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield this process's part of every batch."""
    for batch in batches:
        if batch.size is None:
            raise PruningError(
                "several processes can share only batches made of tensors with one entry per "
                "example in tuples, lists or dicts; where each has batches of its own, give "
                "sharded=True"
            )
        part = batch[part_of(len(batch))]
        if len(part):
            yield part


def own_examples(batches: Iterable[Batch], *, sharded: bool) -> int:
    """Return how many examples of these this process takes; 0 where a batch is kept whole."""
    sizes = [batch.size for batch in batches]
    if None in sizes:
        return 0
    parts = [slice(0, size) if sharded else part_of(size) for size in sizes if size is not None]
    return sum(part.stop - part.start for part in parts)


def check_undivided(data: Any) -> None:
    """Raise if one of several processes is given its own part of the data by a sampler."""
    if processes() == 1:
        return
    waiting, seen = [data], set[int]()
    while waiting:
        part = waiting.pop()
        seen.add(id(part))
        for count, rank in _PARTS:
            found = getattr(part, count, None)
            if isinstance(found, int) and found > 1 and hasattr(part, rank):
                raise PruningError(
                    f"the data gives each process a part of its own ({type(part).__name__} has "
                    f"{count}={found}), of which it would take a part again: give sharded=True, "
                    "or data that gives every process the same batches"
                )
        inside = (getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset"))
        waiting += [found for found in inside if found is not None and id(found) not in seen]


def check_alike(first: Batch | None, device: torch.device) -> None:
    """Raise on every process unless all have the same first batch."""
    told = 0
    for leaf in () if first is None else first.leaves:
        if isinstance(leaf, Tensor):
            told = zlib.crc32(f"{tuple(leaf.shape)} {leaf.dtype}".encode(), told)
            some = leaf.detach().flatten()[:: max(1, leaf.numel() // _SAMPLE)]
            told = zlib.crc32(some.cpu().contiguous().view(torch.uint8).numpy().tobytes(), told)
    ends = torch.tensor([told, -told], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    if int(ends[0]) != -int(ends[1]):
        raise PruningError(
            "the processes of the group have different data, their first batches show, where each "
            "takes its part of the same: give sharded=True if each has a share of its own, else "
            "the same batches in the same order"
        )


def sum_over_processes_(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its sum over the processes, the same to the last bit on each."""
    for tensor in tensors:
        dist.reduce(tensor, dst=0)
        dist.broadcast(tensor, src=0)


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, if there are several."""
    if processes() > 1:
        sum_over_processes_([tensor])
    return tensor


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Do something that can go wrong on one process, and raise on all if it does on any.

    So none waits for one that stopped.
    """
    if processes() == 1:
        yield
        return
    error = None
    try:
        yield
    except PruningError as raised:
        error = raised
    failed = torch.tensor([float(error is not None)], device=device)
    dist.all_reduce(failed)
    if not failed.item():
        return
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if error is None else str(error))
    if error is not None:
        raise error
    first = next(text for text in texts if text is not None)
    raise PruningError(f"another process of the group could not measure its examples: {first}")


def own_generator(shared: torch.Generator) -> torch.Generator:
    """Return a generator of this process's own, of several seeded by one that all have alike.

    With the shared one the examples of one process would get the draws of another's, and as each
    draws for as many examples as it has, it would be alike no more.
    """
    if processes() == 1:
        return shared
    seeds = torch.randint(2**62, (dist.get_world_size(),), generator=shared)
    return torch.Generator().manual_seed(int(seeds[dist.get_rank()]))


def as_the_first_has_(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by the first process's, if several work together."""
    if processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def number_of_the_first(number: float) -> float:
    """Return a number that decides, such as seconds: the first process's, if several work."""
    found = torch.tensor(number, dtype=torch.float64)
    as_the_first_has_([found])
    return float(found)


def shared_random_state() -> Tensor:
    """Return torch's global random state: the first process's, if several work together."""
    state = torch.get_rng_state()
    if processes() > 1:
        box = [state]
        dist.broadcast_object_list(box, src=0)
        state = box[0]
    return state
