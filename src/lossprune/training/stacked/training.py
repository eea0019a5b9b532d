"""Training many networks of one architecture together."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lossprune.data import Dataset
from lossprune.training.evaluation import Evaluation
from lossprune.training.loop import Outcome
from lossprune.training.stacked.epoch import Epoch, TogetherTraining, group_members
from lossprune.training.stacked.in_turn import InTurn
from lossprune.training.stacked.stackable import check_by_trial, perceptron_layers, read_members
from lossprune.training.stacked.steps import AnySteps, PerceptronSteps
from lossprune.training.stacked.together import Together


class StackedTraining(TogetherTraining):
    """Networks of one architecture that train together, each as it would alone, to rounding.

    Each has its own weights, mask, order, augmentation, learning rate, weight decay, momentum and
    divergence.  Batches are gathered once for the networks that share a data set object and whose
    generators are in the same state.  Multilayer perceptrons take steps that are written out; other
    networks go through :func:`torch.func.vmap`.

    >>> from lossprune.data import load
    >>> from lossprune.networks import NETWORKS
    >>> from lossprune.training import make_optimizer
    >>> digits = load("digits", seed=1111)
    >>> def seeded(seed):
    ...     return torch.Generator().manual_seed(seed)
    >>> networks = [NETWORKS["MLP"](shape=digits.shape, generator=seeded(n)) for n in range(3)]
    >>> rates = (0.1, 0.001, 1e38)
    >>> optimizers = [make_optimizer(own, lr=lr, l2=0) for own, lr in zip(networks, rates)]
    >>> training = StackedTraining(networks, [None] * 3, [digits] * 3)
    >>> losses = training.train_epoch(optimizers, generators=[seeded(7) for _ in networks])
    >>> training.store(range(3))
    >>> losses[0] < losses[1]
    True
    >>> losses[2]
    DivergedError('the training loss is not finite within 13 steps')
    >>> training.evaluate("valid")[0].error < 0.2
    True

    Args:
        networks: built alike, on one device, in float32 or float64; trained in place.
        masks: for each, bool tensors by parameter name, True where a weight is kept; None: all.
            Removed weights are exactly 0 after every step.
        datasets: for each, on the networks' device; they may differ in their examples, not in how
            many there are.
        together: take each step of all networks at once; False: some steps of one network after the
            other, over the same batches; None: False for perceptrons on the CPU, whose weights then
            stay in its caches, and True elsewhere.

    Raises:
        NotStackableError: the networks cannot be stacked; the message says why.
    """

    mode = "stacked"

    def __init__(
        self,
        networks: Sequence[nn.Module],
        masks: Sequence[Mapping[str, Tensor] | None],
        datasets: Sequence[Dataset],
        *,
        together: bool | None = None,
    ) -> None:
        super().__init__(networks, datasets)
        members = read_members(networks, masks, datasets)
        layers = perceptron_layers(networks[0], datasets[0])
        if together is None:
            together = layers is None or next(networks[0].parameters()).device.type != "cpu"
        if layers is None:
            self._steps = AnySteps(networks[0])
            check_by_trial(self._steps, members, datasets[0])
        else:
            self._steps = PerceptronSteps(layers)
        self._order = (Together if together else InTurn)(members, self._steps)

    @property
    def reason(self) -> str:
        """What is trained, and how, in one line."""
        return f"{len(self.networks)} networks {self._order.how}, {self._steps.what}"

    @torch.no_grad()
    def _train(self, epoch: Epoch) -> dict[int, Outcome]:
        for member in epoch.optimizers:
            self.networks[member].train()
        return self._order.train(epoch)

    def store(self, members: Iterable[int]) -> None:
        """Write back what was trained; hooks and schedules of the optimizers see a step."""
        self._order.store(members)

    @torch.no_grad()
    def _evaluate(self, which: str, members: Sequence[int]) -> dict[int, Evaluation]:
        return self._order.evaluate(which, group_members(members, self.datasets))
