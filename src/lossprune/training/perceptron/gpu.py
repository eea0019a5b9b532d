"""One pruned perceptron over its surviving weights alone, on a GPU: a sparse stack of one."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.data import Dataset, Split
from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import DivergedError
from lossprune.training.perceptron.stack import SparseStack
from lossprune.training.perceptron.stack_kernel import Machine


class SparseGpuTraining:
    """The surviving weights of a multilayer perceptron on a GPU, for whole epochs of SGD.

    What :class:`lossprune.training.SparseTraining` is on the CPU.  Its epochs are, to the bit, what
    they are in a sparse stack of many; arguments and errors are those of
    :class:`lossprune.training.SparseStack`.
    """

    mode = "sparse"

    def __init__(
        self,
        network: nn.Module,
        mask: Mapping[str, Tensor],
        dataset: Dataset,
        *,
        machine: Machine | None = None,
    ) -> None:
        self.dataset = dataset
        self._stack = SparseStack([network], [mask], [dataset], machine=machine)

    @property
    def reason(self) -> str:
        """What is trained, in one line."""
        return f"on the GPU, {self._stack.sizes}"

    def train_epoch(
        self, optimizer: Optimizer, *, batch_size: int = 100, generator: torch.Generator
    ) -> float:
        """Do what :func:`lossprune.training.train_epoch` does, and return the mean loss.

        Raises:
            DivergedError: the loss becomes infinite or NaN.
            ValueError: another optimizer than plain SGD on all parameters.
        """
        (outcome,) = self._stack.train_epoch(
            [optimizer], batch_size=batch_size, generators=[generator]
        )
        self._stack.store([0])
        # Hooks and schedules see a step; without gradients it changes no parameter.
        optimizer.zero_grad(set_to_none=True)
        optimizer.step()
        if isinstance(outcome, DivergedError):
            raise outcome
        return outcome

    def evaluate(self, split: Split) -> Evaluation:
        """Return what :func:`lossprune.training.evaluate` does, to rounding.

        Raises:
            ValueError: it is none of the splits that the data set scores.
        """
        for which, own in self.dataset.scored.items():
            if own.images.data_ptr() == split.images.data_ptr() and len(own) == len(split):
                return self._stack.evaluate(which)[0]
        raise ValueError("split must be one of the data set's own")
