"""Training many networks of one architecture together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossprune.data import Dataset
from lossprune.training.evaluation import NOT_EVALUATED, Evaluation
from lossprune.training.loop import Outcome
from lossprune.training.plain import check_batch_size, common_settings
from lossprune.training.stacked.epoch import (
    Epoch,
    active_members,
    check_split,
    group_members,
)
from lossprune.training.stacked.in_turn import InTurn
from lossprune.training.stacked.stackable import check_by_trial, perceptron_layers, read_members
from lossprune.training.stacked.steps import AnySteps, PerceptronSteps
from lossprune.training.stacked.together import Together


class StackedTraining:
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
        self.networks, self.datasets = tuple(networks), tuple(datasets)
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
        for member in members:
            self.networks[member].train()
        epoch = Epoch(
            groups=group_members(members, self.datasets, generators),
            optimizers={member: optimizers[member] for member in members},
            settings=settings,
            momentum=momentum,
            batch_size=batch_size,
        )
        with torch.no_grad():
            found = self._order.train(epoch)
        return [found.get(member, math.nan) for member in range(len(self.networks))]

    def store(self, members: Iterable[int]) -> None:
        """Write what was trained to the networks and optimizers of ``members``, by position.

        Momentum is in torch's own format, and hooks and schedules have seen a step: the networks
        can go on alone.  One that is changed without this loses what it was trained since.
        """
        self._order.store(members)

    def evaluate(self, which: str, active: Sequence[bool] | None = None) -> list[Evaluation]:
        """Return what :func:`lossprune.training.evaluate` does for each member, to rounding.

        Args:
            which: ``"train"``, ``"valid"`` or ``"test"``; of each member's own data set, those
                examples that are scored.
            active: False for members that are left out, with NaN; None: all are evaluated.
        """
        check_split(which, self.datasets[0])
        members = self._active(active)
        if not members:
            return [NOT_EVALUATED] * len(self.networks)
        with torch.no_grad():
            found = self._order.evaluate(which, group_members(members, self.datasets))
        return [found.get(member, NOT_EVALUATED) for member in range(len(self.networks))]

    def _active(self, active: Sequence[bool] | None) -> list[int]:
        if active is not None:
            self._check_counts(active=active)
        return active_members(active, len(self.networks))

    def _check_counts(self, **given: Sequence[Any]) -> None:
        for name, values in given.items():
            if len(values) != len(self.networks):
                raise ValueError(
                    f"{name} must be one for each of the {len(self.networks)} networks, "
                    f"got {len(values)}"
                )
