"""Measuring with several processes: who takes which examples, and how the sums come together."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.errors import PruningError


def processes() -> int:
    """Return how many processes measure together: 1 without an initialised group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield this process's part of every batch: contiguous, the parts of near-equal size."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for batch in batches:
        if batch.size is None:
            raise PruningError(
                "several processes can share only batches made of tensors with one entry per "
                "example in tuples, lists or dicts"
            )
        part = slice(len(batch) * rank // world, len(batch) * (rank + 1) // world)
        if len(batch[part]):
            yield batch[part]


def sum_over_processes_(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its sum over the processes, the same to the last bit on each."""
    for tensor in tensors:
        dist.reduce(tensor, dst=0)
        dist.broadcast(tensor, src=0)


def raise_together(error: PruningError | None, device: torch.device) -> None:
    """Raise on every process if any has an error, so that none waits for one that stopped."""
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
    """Return a generator of this process's own, seeded by one that all processes have alike.

    With the shared one the examples of one process would get the draws of another's, and as each
    draws for as many examples as it has, it would be alike no more.
    """
    seeds = torch.randint(2**62, (dist.get_world_size(),), generator=shared)
    return torch.Generator().manual_seed(int(seeds[dist.get_rank()]))


def shared_random_state() -> Tensor:
    """Return torch's global random state: the first process's, if several work together."""
    state = torch.get_rng_state()
    if processes() > 1:
        box = [state]
        dist.broadcast_object_list(box, src=0)
        state = box[0]
    return state
