"""One epoch of stochastic gradient descent."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lossprune.data import Dataset
from lossprune.pruning.wholeness import check_whole

CHECK_EVERY = 100  # steps between two looks at the loss


class DivergedError(ArithmeticError):
    """The training loss is not a number any more; the message says where."""


Outcome = float | DivergedError  # of an epoch: the mean loss on the way, or why there is none


def make_optimizer(network: nn.Module, *, lr: float, l2: float, momentum: float = 0.9) -> SGD:
    """Return SGD with momentum and weight decay on every parameter, all updated in one call."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return SGD(parameters, lr=lr, momentum=momentum, weight_decay=l2, fused=True)


def training_batches(
    dataset: Dataset, size: int, generator: torch.Generator, share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw order and augmentation of an epoch, at once, and return its batches."""
    train = dataset.train
    order = torch.randperm(len(train), generator=generator)
    return dataset.batches(
        train, size, order=order, generator=generator, augment=dataset.augmented, share=share
    )


def train_epoch(
    network: nn.Module,
    dataset: Dataset,
    optimizer: Optimizer,
    *,
    batch_size: int = 100,
    generator: torch.Generator,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Visit every training example once, in random order, and return the mean loss on the way.

    The loss is mean cross-entropy.  Where the data set asks for it, images are augmented.  On a GPU
    no step waits for the device: a loss that is not finite is found when the epoch is over.

    Args:
        network: maps inputs to logits; trained in place, left in training mode.
        dataset: on the network's device.
        optimizer: steps once a batch; a mask may be enforced on it.
        batch_size: examples a step; the last batch holds what is left.
        generator: a CPU generator that draws the order and the augmentation.
        forward: computes the network's logits; None: a call of the network.

    Raises:
        DivergedError: the loss becomes infinite or NaN.
        PruningError: parameters are offloaded, on the meta device, sharded or not initialised yet.
    """
    check_whole(network)
    network.train()
    forward = forward or network
    examples = len(dataset.train)
    batches = training_batches(dataset, batch_size, generator)
    total = torch.zeros(1, device=dataset.train.labels.device)
    losses = Losses()
    step = 0
    for step, (inputs, labels) in enumerate(batches, start=1):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward(inputs), labels)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(labels)
        if step % CHECK_EVERY == 0:
            losses.note(step, total)
            if total.device.type == "cpu":
                losses.mean(examples)
    losses.note(step, total)
    return losses.mean(examples)


class Losses:
    """The sums of the losses of an epoch, of one network or more, as they were at some steps."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._totals: list[Tensor] = []

    def note(self, step: int, totals: Tensor) -> None:
        """Keep the sums (networks,) as they are now, without waiting for the device."""
        if not self._steps or self._steps[-1] != step:
            self._steps.append(step)
            self._totals.append(totals.clone())

    def outcomes(self, examples: int) -> list[Outcome]:
        """Return each network's mean loss, or the error of the first step at which it is none."""
        totals = torch.stack(self._totals).cpu()
        finite = totals.isfinite()
        # Divided by here: a GPU may round the quotient otherwise.
        return [
            total / examples if ok else not_finite(self._steps[first])
            for total, ok, first in zip(
                totals[-1].tolist(),
                finite.all(0).tolist(),
                finite.int().argmin(0).tolist(),
                strict=True,
            )
        ]

    def mean(self, examples: int) -> float:
        """Return the mean loss of the only network.

        Raises:
            DivergedError: it was not finite at one of the steps.
        """
        (outcome,) = self.outcomes(examples)
        return mean_of(outcome)


def not_finite(step: int) -> DivergedError:
    """Return the error of a loss that was found infinite or NaN at ``step``."""
    return DivergedError(f"the training loss is not finite within {step} steps")


def mean_of(outcome: Outcome) -> float:
    """Return the mean loss, or raise the error that stands in its place."""
    if isinstance(outcome, DivergedError):
        raise outcome
    return outcome
