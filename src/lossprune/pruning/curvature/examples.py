"""Reading an exact number of examples from whatever batches there are."""

from collections.abc import Iterable, Iterator
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
