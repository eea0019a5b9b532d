"""An epoch of several networks: who trains how, and on which batches, gathered once for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from lossprune.data import Dataset
from lossprune.training.evaluation import Evaluation
from lossprune.training.stacked.state import Stack

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BatchGroup:
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


def group_members(
    members: Sequence[int],
    datasets: Sequence[Dataset],
    generators: Sequence[torch.Generator] | None = None,
) -> list[BatchGroup]:
    """Return the groups of ``members``: one data set object, and generators in the same state."""
    found: dict[tuple[int, bytes], list[int]] = {}
    for member in members:
        state = b"" if generators is None else generators[member].get_state().numpy().tobytes()
        found.setdefault((id(datasets[member]), state), []).append(member)
    return [
        BatchGroup(
            tuple(own),
            datasets[own[0]],
            () if generators is None else tuple(generators[member] for member in own),
        )
        for own in found.values()
    ]


@dataclass(frozen=True)
class Epoch:
    """An epoch of some members, all by their position.

    Attributes:
        groups: who trains, by who shares batches.
        optimizers: of each member.
        settings: learning rate and weight decay of each member.
        momentum: the same for all.
        batch_size: examples a step.
    """

    groups: Sequence[BatchGroup]
    optimizers: Mapping[int, Optimizer]
    settings: Mapping[int, Mapping[str, Any]]
    momentum: float
    batch_size: int


def active_members(active: Sequence[bool] | None, count: int) -> list[int]:
    """Return the positions of those that are active; None: of all."""
    if active is None:
        return list(range(count))
    return [member for member, own in enumerate(active) if own]


def check_split(which: str, dataset: Dataset) -> None:
    """Raise ValueError unless ``which`` names a split."""
    if which not in dataset.splits:
        raise ValueError(f"which must be train, valid or test, got {which!r}")


class Spread:
    """From one batch a group to what a stack takes: (1 or m, n, …), 1 where all share a batch."""

    def __init__(
        self,
        groups: Sequence[BatchGroup],
        members: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        group_of = {member: which for which, group in enumerate(groups) for member in group.members}
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


class EvaluationSums:
    """Sums of losses and of errors over the examples that a stack has seen."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._losses = torch.zeros_like(stack.totals)
        self._wrong = torch.zeros_like(stack.totals)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count logits (m, n, c) of examples with ``labels`` (1 or m, n)."""
        labels = labels.expand(len(logits), -1)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        self._losses += losses.view(labels.shape).sum(1, dtype=torch.float64)
        self._wrong += (logits.argmax(2) != labels).sum(1)

    def evaluations(self, examples: int) -> list[Evaluation]:
        """Return each member's."""
        both = torch.stack((self._losses, self._wrong)).T.tolist()
        return [Evaluation.mean(loss, wrong, examples) for loss, wrong in both]
