"""Loss and error rate of a network on one split."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossprune.data import Dataset, Split
from lossprune.pruning.wholeness import check_whole
from lossprune.torch_state import in_mode

MOST = 1000  # examples at a time, ...
NUMBERS = 1 << 24  # ... and fewer where their inputs would be more numbers than these


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, and the fraction of examples whose largest logit is not their label."""

    loss: float
    error: float

    @classmethod
    def mean(cls, loss: float, wrong: float, examples: int) -> Self:
        """Return that of a sum of losses and a number of errors over so many examples.

        The quotients are Python's: a GPU may round them otherwise.
        """
        return cls(loss / examples, wrong / examples)


NOT_EVALUATED = Evaluation(math.nan, math.nan)


def evaluate(
    network: nn.Module,
    dataset: Dataset,
    split: Split,
    *,
    batch_size: int | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Evaluate ``network`` on all examples of ``split``, in evaluation mode, without augmentation.

    Args:
        network: maps inputs (n, channels, height, width) to logits (n, classes); its mode is left
            as it was.
        dataset: normalises the images.
        split: usually one of the data set's own, on the network's device.
        batch_size: examples at a time; it changes the result by rounding only.  If not given,
            1000, or as many as have 16 million numbers.
        forward: computes the network's logits; None: a call of the network.
    """
    loss, wrong = count_losses(network, dataset, split, batch_size=batch_size, forward=forward)
    return Evaluation.mean(loss, wrong, len(split))


@torch.inference_mode()
def count_losses(
    network: nn.Module,
    dataset: Dataset,
    split: Split,
    *,
    batch_size: int | None = None,
    share: tuple[int, int] = (0, 1),
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, int]:
    """Return the sum of the losses and the number of wrong answers on a share of the examples.

    Arguments are those of :func:`evaluate`; ``share`` is as in :meth:`Dataset.batches`.
    """
    check_whole(network, offloaded=True)
    if batch_size is None:
        batch_size = examples_at_a_time(dataset)
    forward = forward or network
    losses, wrong = [], []
    with in_mode(network, training=False):
        for inputs, labels in dataset.batches(split, batch_size, share=share):
            logits = forward(inputs)
            losses.append(F.cross_entropy(logits, labels, reduction="sum"))
            wrong.append((logits.argmax(1) != labels).sum())
    # One transfer at the end, and a sum in double precision.
    return sum(torch.stack(losses).tolist()), sum(torch.stack(wrong).tolist())


def examples_at_a_time(dataset: Dataset) -> int:
    """Return how many examples are evaluated at once, if nobody says it."""
    return max(1, min(MOST, NUMBERS // math.prod(dataset.shape)))
