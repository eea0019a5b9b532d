"""Examples for the stages of a pruning."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lossprune.data import Dataset


class Draws:
    """Batches of examples that are drawn afresh each time that it is iterated.

    Args:
        total: how many there are to draw from.
        count: how many of them to draw.
        take: gives a batch of the examples at these indices.
        seed: of the draws.
        size: examples a batch; None: all in one.
    """

    def __init__(
        self,
        total: int,
        count: int,
        take: Callable[[Tensor], Any],
        *,
        seed: int,
        size: int | None = None,
    ) -> None:
        self.total, self.count, self.take, self.size = total, count, take, size or count
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Any]:
        chosen = torch.randperm(self.total, generator=self.generator)[: self.count]
        yield from map(self.take, chosen.split(self.size))


def training_draws(dataset: Dataset, count: int, *, seed: int, size: int | None = None) -> Draws:
    """Of the training images, without augmentation."""

    def take(chosen: Tensor) -> tuple[Tensor, Tensor]:
        (batch,) = dataset.batches(dataset.train, len(chosen), order=chosen)
        return batch

    return Draws(len(dataset.train), count, take, seed=seed, size=size)
