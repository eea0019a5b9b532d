"""Reading an exact number of examples from whatever batches there are."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from lossprune.pruning.curvature.batch import Batch, Forward, join
from lossprune.pruning.curvature.distributed import part_of
from lossprune.pruning.curvature.forms import check_batches
from lossprune.pruning.errors import PruningError

NO_EXAMPLES = "the data has no examples: it gave no batch, or only empty ones"


def take(
    batches: Iterable[Any],
    examples: int | None,
    forward: Forward | None = None,
    *,
    sharded: bool = False,
) -> Iterator[Batch]:
    """Yield batches until exactly ``examples`` examples are read, the last one cut; None: all.

    ``sharded`` says that the batches are this process's share of the data of several: it then
    reads its part of so many examples, which may be none.

    Raises:
        PruningError: there are fewer (both numbers are named), none at all, or a batch is of no
            form that is understood (see :meth:`Batch.of`), or must be kept whole, and a number of
            examples is asked for.

    >>> batches = [(torch.zeros(3, 2), torch.zeros(3)), (torch.ones(3, 2), torch.ones(3))]
    >>> [len(batch) for batch in take(batches, 4)]
    [3, 1]
    """
    check_examples(examples)
    check_batches(batches, forward)
    wanted, read, whole = examples, 0, False
    if sharded and examples is not None:
        part = part_of(examples)
        wanted = part.stop - part.start
    for given in batches if wanted != 0 else ():
        batch = Batch.of(given, forward)
        if batch.size is None:
            if examples is not None:
                raise PruningError(
                    f"examples={examples} cannot be counted in a batch that is not made of tensors "
                    "with one entry per example in tuples, lists or dicts: leave examples out, "
                    f"or give other batches than {type(given).__name__}"
                )
            whole = True
            yield batch
            continue
        if wanted is not None:
            batch = batch[: wanted - read]
        read += len(batch)
        if len(batch):
            yield batch
        if read == wanted:
            return
    if read == 0 and not whole and not sharded:
        raise PruningError(NO_EXAMPLES)
    if read != wanted and wanted is not None:
        share = f", {wanted} of them of this process" if sharded else ""
        raise PruningError(
            f"{examples} examples were asked for{share}, but the data has only {read}"
        )


def peek(batches: Iterable[Batch]) -> tuple[Batch | None, Iterator[Batch]]:
    """Return a batch of the first examples, at least two if possible, and all the batches."""
    batches = iter(batches)
    first = list(islice(batches, 1))
    while first and len(first) < 2 and first[0].size == 1:
        more = list(islice(batches, 1))
        if not more or more[0].kind != first[0].kind:
            return first[0], chain(first, more, batches)
        first += more
    return (join(first) if first else None), chain(first, batches)


def regroup(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield the same examples, ``size`` at a time (fewer where shapes change, and at the end).

    >>> batches = [(torch.zeros(3, 2), torch.zeros(3)), (torch.ones(3, 2), torch.ones(3))]
    >>> [len(batch) for batch in regroup(map(Batch.of, batches), 4)]
    [4, 2]
    """
    waiting: list[Batch] = []
    for batch in batches:
        if waiting and batch.kind != waiting[0].kind:
            yield join(waiting)
            waiting = []
        if batch.size is None:
            yield batch
            continue
        count = sum(map(len, waiting))
        while count + len(batch) >= size:
            cut = size - count
            yield join([*waiting, batch[:cut]])
            batch, waiting, count = batch[cut:], [], 0
        if len(batch):
            waiting.append(batch)
    if waiting:
        yield join(waiting)


def check_examples(examples: int | None) -> None:
    """Raise a ``ValueError`` unless ``examples`` is None or a whole number of at least 1."""
    whole = isinstance(examples, int) and not isinstance(examples, bool)
    if examples is not None and not (whole and examples >= 1):
        raise ValueError(
            f"examples must be a whole number of at least 1, or None, got {examples!r}"
        )


def device_of(weights: Iterable[Tensor]) -> torch.device:
    """Return the one device that all weights are on.

    Raises:
        PruningError: they are on several.
    """
    devices = {weight.device for weight in weights}
    if len(devices) > 1:
        raise PruningError(
            "the prunable weights must be on one device, got "
            + ", ".join(sorted(map(str, devices)))
        )
    return devices.pop()
