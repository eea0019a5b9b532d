"""The mean loss of a network over some examples, measured at one mask after another."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.budget import Budget, checked_memory
from lossprune.pruning.curvature.estimators import Estimator
from lossprune.pruning.curvature.examples import peek, regroup
from lossprune.pruning.curvature.losses import FullLoss
from lossprune.pruning.curvature.network import MaskedNetwork, PrunableNetwork
from lossprune.pruning.curvature.plainly import evaluating
from lossprune.pruning.curvature.probe import Costs, probe
from lossprune.pruning.curvature.statistics import OUTPUTS, Statistics, Sums, check_finite
from lossprune.pruning.errors import PruningError
from lossprune.pruning.randomness import PrivateRandomness

# Examples whose columns an estimator that packs chooses, and sorts, together.
_WINDOW = 8192


class Objective:
    """m ↦ L(θ ⊙ m): the mean loss of a network over examples, for as long as θ stays as it is.

    The first measurement runs a few of the examples to see what they cost; those that follow, at
    other masks, take the same chunks.  A loss that was found beside something else is not measured
    again, where that sums to the same bits.

    Attributes:
        network: whose θ and buffers are read for every measurement.
        batches: the examples; a list where they are measured more than once.
        loss: of one example.
        memory: bytes that a measurement may take at once.
        generator: gives a CPU generator of what is drawn, for each measurement.
        sharded: whether the batches are this process's share of the data of several.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        batches: Iterable[Batch],
        loss: FullLoss,
        *,
        memory: int | None = None,
        generator: Callable[[], torch.Generator] = lambda: torch.default_generator,
        sharded: bool = False,
    ) -> None:
        self.network = network
        self.batches = batches
        self.loss = loss
        self.memory = checked_memory(memory, network.device)
        self.generator = generator
        self.sharded = sharded
        self._costs: Costs | None = None
        self._known: tuple[Mapping[str, Tensor] | None, Statistics] | None = None

    def measure(
        self,
        mask: Mapping[str, Tensor] | None,
        *,
        gradient: bool = False,
        estimator: Estimator | None = None,
    ) -> Statistics:
        """Return the loss at θ ⊙ m, with the gradient and the GGN diagonal if asked for.

        Raises:
            PruningError: as :func:`lossprune.measure`.
        """
        alone = not gradient and estimator is None
        if alone and self._known is not None and self._known[0] is mask:
            return self._known[1]
        network = self.network.at(mask)
        if not alone:
            _check_real(network.weights)
        # Processes that measure together draw together: their loaders shuffle alike.
        randomness = PrivateRandomness(distributed.shared_random_state())
        several = distributed.processes() > 1
        with randomness, evaluating(self.network.model, network.device):
            sums = Sums(
                network,
                self.loss,
                gradient=gradient,
                estimator=estimator,
                generator=distributed.own_generator(self.generator()),
            )
            self._add_share(sums) if several else self._add(sums, self.batches)
        statistics = sums.means()
        check_finite(statistics)
        # Columns take memory, and so other chunks than the loss alone, unless one will do.
        if estimator is None or (sums.chunks == 1 and not several):
            self._known = mask, replace(statistics, gradient={}, ggn_diagonal={}, skipped=0.0)
        return statistics

    def _add(self, sums: Sums, batches: Iterable[Batch]) -> None:
        """Add examples, in chunks that keep to the budget."""
        device = self.network.device
        first, batches = peek(batch.to(device) for batch in batches)
        if first is None:  # this process has no share
            return
        costs = self._probed(sums.network, first, curvature=sums.estimator is not None)
        budget = Budget(self.memory, costs.graph_bytes, costs.column_bytes)
        columns, most = self._columns(costs, sums.estimator)
        if sums.estimator is not None and sums.estimator.packs:
            for batch in regroup(batches, min(_WINDOW, most)):
                sums.add_packed(batch, budget)
        else:
            for batch in regroup(batches, min(budget.examples(columns), most)):
                sums.add(batch, budget)
        sums.note_reached()

    def _add_share(self, sums: Sums) -> None:
        """Add this process's share of the examples, and everybody else's sums.

        Where it is ``sharded`` the batches are the share, else those of all, which must be alike.
        """
        device = self.network.device
        batches: Iterator[Batch] = iter(self.batches)
        if not self.sharded:
            with distributed.together(device):
                first = next(batches, None)
            distributed.check_alike(first, device)
            batches = distributed.share(chain([first] if first else [], batches))
        with distributed.together(device):
            self._add(sums, batches)
        sums.join_()

    def _probed(self, network: MaskedNetwork, first: Batch, *, curvature: bool) -> Costs:
        """What the first examples cost: from a measurement before, or found out now."""
        if self._costs is None or (curvature and not self._costs.curvature):
            self._costs = probe(network, first, self.loss, curvature=curvature)
        network.unreached &= self._costs.unreached
        return self._costs

    def _columns(self, costs: Costs, estimator: Estimator | None) -> tuple[int, int]:
        """The columns of an example, and how many examples may go together at most."""
        if estimator is None:
            return 0, sys.maxsize
        outputs = costs.outputs
        columns = estimator.columns(outputs, costs.targets, self.loss, torch.Generator())
        # One example alone does not show whether examples interact, so none go together.
        most = 1 if len(outputs) == 1 else sys.maxsize
        if outputs.ndim > 2 and estimator.packs:  # its columns are written out in full
            most = min(most, max(1, OUTPUTS // (outputs[0].numel() ** 2)))
        return len(columns.keys()), most


def _check_real(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all are real: the models of the loss are of real weights."""
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise PruningError(
                f"{name!r} is complex, of {tensor.dtype}, where the loss has no gradient or "
                f"curvature to prune by: take MP or random, or exclude={name!r}"
            )
