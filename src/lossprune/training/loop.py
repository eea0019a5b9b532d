"""One epoch of stochastic gradient descent."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lossprune.data import Dataset
from lossprune.pruning.wholeness import check_whole

CHECK_EVERY = 100  # steps between two looks at the loss


class DivergedError(ArithmeticError):
    """The training loss is not a number any more; the message says where."""


def make_optimizer(network: nn.Module, *, lr: float, l2: float, momentum: float = 0.9) -> SGD:
    """Return SGD with momentum and weight decay on every parameter, all updated in one call."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return SGD(parameters, lr=lr, momentum=momentum, weight_decay=l2, fused=True)


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
    order = torch.randperm(examples, generator=generator)
    batches = dataset.batches(
        dataset.train, batch_size, order=order, generator=generator, augment=dataset.augmented
    )
    total = torch.zeros((), device=dataset.train.labels.device)
    noted: dict[int, Tensor] = {}
    step = 0
    for step, (inputs, labels) in enumerate(batches, start=1):
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward(inputs), labels)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(labels)
        if step % CHECK_EVERY == 0:
            noted[step] = total.clone()
            if total.device.type == "cpu":
                _check(noted)
    noted[step] = total
    return _check(noted) / examples


def _check(noted: Mapping[int, Tensor]) -> float:
    """Return the last of the totals, by step, if all of them are finite."""
    totals = torch.stack(list(noted.values())).tolist()
    for step, total in zip(noted, totals, strict=True):
        if not math.isfinite(total):
            raise not_finite(step)
    return totals[-1]


def not_finite(step: int) -> DivergedError:
    """Return the error of a loss that was found infinite or NaN at ``step``."""
    return DivergedError(f"the training loss is not finite within {step} steps")
