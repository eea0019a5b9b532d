"""Batches for several networks: gathered once for those that share data set and order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lossprune.data import Dataset

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Group:
    """Members, by position, that visit the same examples in the same order."""

    members: tuple[int, ...]
    dataset: Dataset
    generators: tuple[torch.Generator, ...] = ()

    def training_batches(self, size: int) -> Iterator[Batch]:
        """Draw order and augmentation as the dense loop does, and iterate over the batches.

        Every generator moves on as if its member had drawn alone.
        """
        order, first = self._order(), self.generators[0]
        found = self.dataset.batches(
            self.dataset.train, size, order=order, generator=first, augment=self.dataset.augmented
        )
        self._align()
        return found

    def draw_order(self) -> Tensor:
        """Draw the order alone, of data that are not augmented."""
        order = self._order()
        self._align()
        return order

    def _order(self) -> Tensor:
        return torch.randperm(len(self.dataset.train), generator=self.generators[0])

    def _align(self) -> None:
        first, *others = self.generators
        for other in others:
            other.set_state(first.get_state())


def group_by_order(
    members: Sequence[int], datasets: Sequence[Dataset], generators: Sequence[torch.Generator]
) -> list[Group]:
    """Return the groups of ``members``: one data set object, generators in the same state."""
    found: dict[tuple[int, bytes], list[int]] = {}
    for member in members:
        state = generators[member].get_state().numpy().tobytes()
        found.setdefault((id(datasets[member]), state), []).append(member)
    return [
        Group(tuple(own), datasets[own[0]], tuple(generators[it] for it in own))
        for own in found.values()
    ]


def group_by_dataset(members: Sequence[int], datasets: Sequence[Dataset]) -> list[Group]:
    """Return the groups of ``members`` that have one data set object."""
    found: dict[int, list[int]] = {}
    for member in members:
        found.setdefault(id(datasets[member]), []).append(member)
    return [Group(tuple(own), datasets[own[0]]) for own in found.values()]


class Spread:
    """From one batch a group to what a stack takes: (1 or m, n, …), 1 where all share a batch."""

    def __init__(
        self,
        groups: Sequence[Group],
        members: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        group_of = {member: which for which, it in enumerate(groups) for member in it.members}
        self.dtype = dtype
        self.rows = 1 if len(groups) == 1 else len(members)
        self.index = torch.tensor([group_of[member] for member in members], device=device)

    def __call__(self, batches: Sequence[Batch]) -> Batch:
        """Map a batch of each group to inputs and labels of all members."""
        inputs, labels = (torch.stack(parts) for parts in zip(*batches, strict=True))
        inputs = inputs.to(self.dtype)
        if self.rows == 1:
            return inputs, labels
        return inputs.index_select(0, self.index), labels.index_select(0, self.index)


def in_lockstep(
    streams: Sequence[Iterator[Batch]], ahead: int
) -> Iterator[list[tuple[Batch, ...]]]:
    """Yield up to ``ahead`` batches of every stream at a time."""
    together = zip(*streams, strict=True)
    while chunk := list(islice(together, ahead)):
        yield chunk
