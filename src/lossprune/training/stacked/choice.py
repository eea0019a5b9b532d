"""How many networks are trained together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.data import Dataset
from lossprune.kernels.cuda import NoCudaCompiler
from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import DivergedError
from lossprune.training.perceptron.stack import SparseStack
from lossprune.training.perceptron.structure import NotSparseError
from lossprune.training.stacked.stackable import NotStackableError
from lossprune.training.stacked.training import StackedTraining


class TogetherTraining(Protocol):
    """A way to train and evaluate many networks, each on its own data set, by their position."""

    @property
    def mode(self) -> str:
        """One word for the records, such as ``"stacked"``."""
        ...

    @property
    def reason(self) -> str:
        """What is trained together and how, in one line."""
        ...

    def train_epoch(
        self,
        optimizers: Sequence[Optimizer],
        *,
        batch_size: int = 100,
        generators: Sequence[torch.Generator],
        active: Sequence[bool] | None = None,
    ) -> list[float | DivergedError]:
        """Train an epoch of the active members, and return each one's mean loss or its error."""
        ...

    def evaluate(self, which: str, active: Sequence[bool] | None = None) -> list[Evaluation]:
        """Return loss and error rate of the active members on one of the three splits."""
        ...

    def store(self, members: Iterable[int]) -> None:
        """Write what was trained to the networks and optimizers of these members.

        Until then they may be older than what is trained, and nobody may change them.
        """
        ...


def choose_stack(
    networks: Sequence[nn.Module],
    masks: Sequence[Mapping[str, Tensor] | None],
    datasets: Sequence[Dataset],
    train: str = "auto",
) -> TogetherTraining:
    """Return the training of networks together; arguments as :class:`StackedTraining`.

    Args:
        networks: built alike.
        masks: of each, or None.
        datasets: of each.
        train: ``"auto"``, on a GPU over the surviving weights where all are pruned and it can be
            done; ``"dense"``; or ``"sparse"``, which on the CPU is done alone.

    Raises:
        NotStackableError: they cannot be trained together; the message says why.
    """
    on_gpu = next(networks[0].parameters()).device.type == "cuda"
    if train == "sparse" and not on_gpu:
        raise NotStackableError("sparse training was asked for, which is done alone")
    if on_gpu and train != "dense" and all(mask is not None for mask in masks):
        try:
            return SparseStack(networks, masks, datasets)
        except (NotSparseError, NoCudaCompiler) as error:
            if train == "sparse":
                raise NotStackableError(str(error)) from None
    return StackedTraining(networks, masks, datasets)
