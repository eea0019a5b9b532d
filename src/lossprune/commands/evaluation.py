"""Loss and error of a network on batches of its own, as ``lossprune prune --test`` tells them."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.pruning import validation
from lossprune.pruning.curvature.batch import Batch, Forward
from lossprune.pruning.curvature.forms import default_forward
from lossprune.pruning.curvature.losses import find_loss
from lossprune.pruning.curvature.running import described, run
from lossprune.torch_state import in_mode


@dataclass(frozen=True)
class LossAndError:
    """What a network does on test data.

    Attributes:
        loss: the mean.
        error: the share of wrong answers; None where the loss is not one of classes.
        examples: how many were read.
    """

    loss: float
    error: float | None
    examples: int


def told_tests(before: LossAndError, after: LossAndError) -> str:
    """Return what pruning did to the network on the test data, in one line."""
    told = f"test loss {before.loss:.4f} before pruning, {after.loss:.4f} after"
    if before.error is not None and after.error is not None:
        told += f"; test error {before.error:.2%} before, {after.error:.2%} after"
    return f"{told} ({after.examples:,} example{'' if after.examples == 1 else 's'})"


@torch.no_grad()
def loss_and_error(
    network: nn.Module,
    batches: Iterable[Any],
    loss: Any,
    forward: Forward | None,
) -> LossAndError:
    """Return loss and error of ``network`` in evaluation mode on all of ``batches``.

    Args:
        network: left as it is.
        batches: as :func:`lossprune.measure` takes them, moved to the network's device.
        loss: as there.
        forward: as there.

    Raises:
        PruningError: there are no batches, the network cannot be run on one, or its outputs and
            the targets are not what the loss takes.
    """
    known, called = find_loss(loss), forward or default_forward
    tensors = itertools.chain(network.parameters(), network.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))

    def result(given: Any) -> tuple[Tensor, Any]:
        batch = Batch.of(given, forward).to(device)
        return run(
            f"the network could not be run on a test batch of {described(batch.value)}",
            lambda: called(network, batch.value),
            lambda text: "it must be as those of --data",
        )

    with in_mode(network, training=False):
        return LossAndError(*validation.loss_and_error(map(result, batches), known))
