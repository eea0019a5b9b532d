"""An epoch of several networks: who trains how, and on which batches, gathered once for all."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.data import Dataset
from lossprune.training.evaluation import NOT_EVALUATED, Evaluation
from lossprune.training.loop import Outcome, training_batches
from lossprune.training.plain import check_batch_size, common_settings
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
        found = training_batches(self.dataset, size, self.generators[0])
        self._align()
        return found

    def draw_order(self) -> Tensor:
        """Draw the order alone, of data that are not augmented."""
        order = torch.randperm(len(self.dataset.train), generator=self.generators[0])
        self._align()
        return order

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


class TogetherTraining(ABC):
    """A way to train and evaluate many networks, each on its own data set, by their position.

    Attributes:
        mode: one word for the records, such as ``"stacked"``.
    """

    mode: str

    def __init__(self, networks: Sequence[nn.Module], datasets: Sequence[Dataset]) -> None:
        self.networks, self.datasets = tuple(networks), tuple(datasets)

    @property
    @abstractmethod
    def reason(self) -> str:
        """What is trained together and how, in one line."""

    def train_epoch(
        self,
        optimizers: Sequence[Optimizer],
        *,
        batch_size: int = 100,
        generators: Sequence[torch.Generator],
        active: Sequence[bool] | None = None,
    ) -> list[Outcome]:
        """Do for each member what :func:`lossprune.training.train_epoch` does.

        Weights and momentum are those of each network and optimizer.  What comes of them is there
        after :meth:`store`; between epochs they may stay in the stack's own memory.

        Args:
            optimizers: for each member, SGD on all its parameters, as :func:`make_optimizer` makes
                it; the momentum is the same for all.
            batch_size: examples a step; the last batch holds what is left.
            generators: for each member one of its own, which draws order and augmentation.
            active: False for members that are left as they are; None: all are trained.

        Returns:
            For each member its mean loss on the way.  Where that is infinite or NaN, the error that
            the dense loop raises; such a network is then of no use, and no other one is harmed.
            NaN for those that are not active.

        Raises:
            ValueError: another optimizer, momenta that differ, a batch size below 1, or a count
                that is not the networks'.
        """
        self._check_counts(optimizers=optimizers, generators=generators)
        members = self._active(active)
        if not members:
            return [math.nan] * len(self.networks)
        check_batch_size(batch_size)
        settings, momentum = common_settings(self.networks, optimizers, members)
        epoch = Epoch(
            groups=group_members(members, self.datasets, generators),
            optimizers={member: optimizers[member] for member in members},
            settings=settings,
            momentum=momentum,
            batch_size=batch_size,
        )
        found = self._train(epoch)
        return [found.get(member, math.nan) for member in range(len(self.networks))]

    def evaluate(self, which: str, active: Sequence[bool] | None = None) -> list[Evaluation]:
        """Return what :func:`lossprune.training.evaluate` does for each member, to rounding.

        Args:
            which: ``"train"``, ``"valid"`` or ``"test"``; of each member's own data set, those
                examples that are scored.
            active: False for members that are left out, with NaN; None: all are evaluated.
        """
        if which not in self.datasets[0].splits:
            raise ValueError(f"which must be train, valid or test, got {which!r}")
        members = self._active(active)
        found = self._evaluate(which, members) if members else {}
        return [found.get(member, NOT_EVALUATED) for member in range(len(self.networks))]

    @abstractmethod
    def store(self, members: Iterable[int]) -> None:
        """Write what was trained to the networks and optimizers of ``members``, by position.

        Momentum is in torch's own format: the networks can go on alone.  Until then they may be
        older than what is trained; one that is changed without this loses what it was trained
        since.
        """

    @abstractmethod
    def _train(self, epoch: Epoch) -> dict[int, Outcome]:
        """Train an epoch, and return what came of each of its members."""

    @abstractmethod
    def _evaluate(self, which: str, members: Sequence[int]) -> dict[int, Evaluation]:
        """Evaluate these members on one split."""

    def _active(self, active: Sequence[bool] | None) -> list[int]:
        if active is None:
            return list(range(len(self.networks)))
        self._check_counts(active=active)
        return [member for member, own in enumerate(active) if own]

    def _check_counts(self, **given: Sequence[Any]) -> None:
        for name, values in given.items():
            if len(values) != len(self.networks):
                raise ValueError(
                    f"{name} must be one for each of the {len(self.networks)} networks, "
                    f"got {len(values)}"
                )


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
