"""What the two orders of work of stacked training share: an epoch's settings, losses and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import DivergedError, not_finite
from lossprune.training.stacked.batches import Group
from lossprune.training.stacked.state import Stack

Outcome = float | DivergedError


class Steps(Protocol):
    """How a stack of one kind of networks computes."""

    def logits(self, stack: Stack, inputs: Tensor) -> Tensor:
        """Map inputs (1 or m, n, …) to logits (m, n, c)."""
        ...

    def step(self, stack: Stack, inputs: Tensor, labels: Tensor, momentum: float) -> None:
        """Take a step of SGD on the mean cross-entropy, and add the losses to the totals."""
        ...


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

    groups: Sequence[Group]
    optimizers: Mapping[int, Optimizer]
    settings: Mapping[int, Mapping[str, Any]]
    momentum: float
    batch_size: int


@dataclass(frozen=True)
class Losses:
    """The totals of a stack at some steps, read only when the epoch is over."""

    steps: list[int] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)

    def note(self, step: int, totals: Tensor) -> None:
        """Keep the totals as they are now, without waiting for the device."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
            self.totals.append(totals.clone())

    def outcomes(self, examples: int) -> list[Outcome]:
        """Return each member's mean loss, or the error of the first step at which it is none."""
        totals = torch.stack(self.totals).cpu()
        finite = totals.isfinite()
        return [
            mean if ok else not_finite(self.steps[first])
            for mean, ok, first in zip(
                (totals[-1] / examples).tolist(),
                finite.all(0).tolist(),
                finite.int().argmin(0).tolist(),
                strict=True,
            )
        ]


class Scores:
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
        # Divided by here: a GPU may round the quotient otherwise.
        return [Evaluation(loss / examples, wrong / examples) for loss, wrong in both]
