"""Reading an exact number of examples from whatever batches there are."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from lossprune.pruning.errors import PruningError

Batch = tuple[Tensor, Tensor]


def take(batches: Iterable[Any], examples: int | None) -> Iterator[Batch]:
    """Yield batches until exactly ``examples`` examples are read, the last one cut; None: all.

    Raises:
        PruningError: there are fewer (both numbers are named), none at all, or a batch is not a
            pair of inputs and targets of one length.

    >>> batches = [(torch.zeros(3, 2), torch.zeros(3)), (torch.ones(3, 2), torch.ones(3))]
    >>> [len(targets) for _, targets in take(batches, 4)]
    [3, 1]
    """
    check_examples(examples)
    read = 0
    for batch in batches:
        inputs, targets = _check_pair(batch)
        if examples is not None:
            inputs, targets = inputs[: examples - read], targets[: examples - read]
        read += len(targets)
        if len(targets):
            yield inputs, targets
        if read == examples:
            return
    if read == 0:
        raise PruningError("the data has no examples: it gave no batch, or only empty ones")
    if examples is not None:
        raise PruningError(f"{examples} examples were asked for, but the data has only {read}")


def peek(batches: Iterable[Batch]) -> tuple[Batch | None, Iterator[Batch]]:
    """Return a batch of the first examples, at least two if possible, and all the batches."""
    batches = iter(batches)
    first = list(islice(batches, 1))
    while first and len(first) < 2 and len(first[0][1]) < 2:
        more = list(islice(batches, 1))
        if not more or more[0][0].shape[1:] != first[0][0].shape[1:]:
            return first[0], chain(first, more, batches)
        first += more
    return (_join(first) if first else None), chain(first, batches)


def regroup(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield the same examples, ``size`` at a time (fewer where shapes change, and at the end).

    >>> batches = [(torch.zeros(3, 2), torch.zeros(3)), (torch.ones(3, 2), torch.ones(3))]
    >>> [len(targets) for _, targets in regroup(batches, 4)]
    [4, 2]
    """
    waiting: list[Batch] = []
    for inputs, targets in batches:
        if waiting and inputs.shape[1:] != waiting[0][0].shape[1:]:
            yield _join(waiting)
            waiting = []
        count = sum(len(part) for _, part in waiting)
        while count + len(targets) >= size:
            cut = size - count
            yield _join([*waiting, (inputs[:cut], targets[:cut])])
            inputs, targets, waiting, count = inputs[cut:], targets[cut:], [], 0
        if len(targets):
            waiting.append((inputs, targets))
    if waiting:
        yield _join(waiting)


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def check_examples(examples: int | None) -> None:
    """Raise a ``ValueError`` unless ``examples`` is None or a whole number of at least 1."""
    whole = isinstance(examples, int) and not isinstance(examples, bool)
    if examples is not None and not (whole and examples >= 1):
        raise ValueError(
            f"examples must be a whole number of at least 1, or None, got {examples!r}"
        )


def _check_pair(batch: Any) -> Batch:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise PruningError(
            f"a batch must be a pair (inputs, targets), got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    inputs, targets = batch
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            raise PruningError(
                f"the {name} of a batch must be a tensor with one entry per example, "
                f"got {type(tensor).__name__}"
            )
    if len(inputs) != len(targets):
        raise PruningError(f"a batch has {len(inputs)} inputs but {len(targets)} targets")
    return inputs, targets


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
