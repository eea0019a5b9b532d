"""Measuring a network on data: mean loss, its gradient and the diagonal of its GGN matrix."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.pruning.choices import Choices
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch, Forward
from lossprune.pruning.curvature.cross_entropy import CrossEntropy
from lossprune.pruning.curvature.estimators import Estimator, Exact, Tolerance, find_estimator
from lossprune.pruning.curvature.examples import peek, regroup, take
from lossprune.pruning.curvature.inputs import check_seen
from lossprune.pruning.curvature.losses import FullLoss, Loss, LossFunction, find_loss
from lossprune.pruning.curvature.network import MaskedNetwork, PrunableNetwork
from lossprune.pruning.curvature.probe import Budget, Costs, checked_memory, probe
from lossprune.pruning.curvature.running import evaluating, outside_inference
from lossprune.pruning.curvature.statistics import Statistics, Sums, check_finite
from lossprune.pruning.randomness import PrivateRandomness
from lossprune.pruning.wholeness import check_whole

# Examples whose columns an estimator that packs chooses, and sorts, together.
_WINDOW = 8192


@outside_inference()
def measure(
    model: nn.Module,
    batches: Iterable[Any],
    examples: int | None = None,
    *,
    mask: Mapping[str, Tensor] | None = None,
    loss: str | Loss | LossFunction = "cross_entropy",
    gradient: bool = True,
    ggn_diagonal: bool = True,
    estimator: str | Estimator = "exact",
    memory: int | None = None,
    generator: torch.Generator | None = None,
    forward: Forward | None = None,
    parameters: Choices | None = None,
    exclude: Choices | None = None,
    sharded: bool = False,
) -> Statistics:
    r"""Measure loss, gradient and GGN diagonal of a network's prunable weights.

    With the loss ℓ of one example, the Jacobian J of its outputs and the Hessian H of ℓ in the
    outputs, the generalised Gauss-Newton matrix is G = mean over examples of Jᵀ H J.  H = S Sᵀ for
    a factor S with a column for each rank of H, hence

        diag(G) = mean over examples of Σ_k (Jᵀ S_k)²,

    one backward pass a column, with gradients at the layers' outputs only; a weight in any other
    use than a layer's on the examples takes one for each example and column.  Source:
    Schraudolph, "Fast curvature matrix-vector products", 2002; the column form as in Dangel et al.,
    "BackPACK", 2020; the computation is described in docs/curvature.md.

    Under an initialised ``torch.distributed`` group every process must call this, with the same
    batches, of each of which it takes its part, or with ``sharded`` and batches of its own; all
    return the same sums.  What an estimator draws depends on how many they are.

    Args:
        model: left as it is, its gradients, hooks, mode and buffers included; measured in
            evaluation mode.  An example's outputs must not depend on the others.
        batches: (inputs, targets) pairs, or dicts of the network's keyword arguments and
            ``labels``; moved to the network's device as needed.
        examples: how many to read, exactly (the last batch is cut); None reads all.
        mask: weights to take as 0, by parameter name, True where kept.
        loss: a name in ``LOSSES``, a :class:`Loss`, or a function of (outputs, targets), for which
            the only estimator is ``"empirical-fisher"``.
        gradient: whether to measure the gradient.
        ggn_diagonal: whether to measure the GGN diagonal.
        estimator: of the GGN diagonal: a name in ``ESTIMATORS`` or an :class:`Estimator`.
        memory: bytes that activations, gradients and products may take at once, beside the
            network, its statistics and the batches; if not given 256 MiB on a CPU and 4 GiB on a
            GPU, or twice the weights where these are large.  At least one example and one column
            are always taken.
        generator: CPU generator of what the estimator draws; torch's global one if not given.
        forward: ``forward(model, batch)`` gives (outputs, targets) of batches of any other form.
            Those of tensors with one entry per example, in tuples, lists and dicts, are cut and
            joined as needed; others are taken whole.
        parameters: whose gradient and curvature to measure, and
        exclude: which of these not; as in :func:`lossprune.prune`.
        sharded: whether the batches of each process of a ``torch.distributed`` group are its own
            share of the data, as a ``DistributedSampler`` gives it.  ``examples`` counts those of
            all processes together, of which each reads an equal part, to one.

    Raises:
        PruningError: too few examples; processes with different data that is not ``sharded``, or
            with a sampler that divides it; outputs or targets that the loss cannot take; examples
            that are not independent; a loss, gradient or curvature that is not finite (named).

    >>> from torch import nn
    >>> model = nn.Linear(4, 3)
    >>> stats = measure(model, [(torch.randn(8, 4), torch.arange(8) % 3)])
    >>> stats.examples, stats.ggn_diagonal["weight"].shape
    (8, torch.Size([3, 4]))
    """
    check_whole(model)
    network = PrunableNetwork(model, forward, parameters, exclude)
    objective = Objective(
        network,
        take(batches, examples, forward, sharded=sharded),
        find_loss(loss),
        memory=checked_memory(memory, network.weights),
        generator=lambda: generator or torch.default_generator,
        sharded=sharded,
    )
    found = find_estimator(estimator) if ggn_diagonal else None
    if not sharded:
        distributed.check_undivided(batches)
    return objective.measure(mask, gradient=gradient, estimator=found)


@dataclass(eq=False)
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
        earlier: what the examples of another objective of this network cost, if any: where its
            batches are alike, it is taken for these.
        frugal: whether labels are refused that take more passes than the exact curvature.
        costs: what a few of the examples showed, once measured.
        heard: ``heard(examples, passes)`` is called as examples are measured: how many more, 0 at
            first; and backward passes for each, where these give exact curvature.
    """

    network: PrunableNetwork
    batches: Iterable[Batch]
    loss: FullLoss
    _: KW_ONLY
    memory: int
    generator: Callable[[], torch.Generator]
    sharded: bool
    heard: Callable[[float, int], None] = lambda examples, passes: None
    earlier: Costs | None = None
    frugal: bool = False

    costs: Costs | None = field(default=None, init=False)
    _known: tuple[Mapping[str, Tensor] | None, Statistics] | None = field(default=None, init=False)

    def measure(
        self,
        mask: Mapping[str, Tensor] | None,
        *,
        gradient: bool = False,
        estimator: Estimator | None = None,
        inputs: bool = False,
    ) -> Statistics:
        """Return the loss at θ ⊙ m, with gradient, GGN diagonal and norms of inputs if asked for.

        Raises:
            PruningError: as :func:`lossprune.measure`; the inputs of a weight are not known.
        """
        alone = not gradient and estimator is None and not inputs
        if alone and self._known is not None and self._known[0] is mask:
            return self._known[1]
        sums = self._sums(mask, gradient=gradient, estimator=estimator, inputs=inputs)
        statistics = _means(sums)
        # Columns take memory, and so other chunks than the loss alone, unless one will do.
        if estimator is None or (sums.chunks == 1 and distributed.processes() == 1):
            alone = {"gradient": {}, "ggn_diagonal": {}, "input_norms": {}, "skipped": 0.0}
            self._known = mask, replace(statistics, **alone)
        return statistics

    def measure_each(self, mask: Mapping[str, Tensor] | None) -> tuple[Statistics, Tensor]:
        """Return the loss at θ ⊙ m; and ℓ of this process's examples, how much each counts: (n, 2).

        Raises:
            PruningError: as :func:`lossprune.measure`.
        """
        sums = self._sums(mask)
        return _means(sums), sums.of_each

    def _sums(
        self,
        mask: Mapping[str, Tensor] | None,
        *,
        gradient: bool = False,
        estimator: Estimator | None = None,
        inputs: bool = False,
    ) -> Sums:
        """Over the examples that this process takes."""
        network = MaskedNetwork(self.network, mask)
        # Processes that measure together draw together: their loaders shuffle alike.
        randomness = PrivateRandomness(distributed.shared_random_state())
        several = distributed.processes() > 1
        with randomness, evaluating(self.network.model):
            sums = Sums(
                network,
                self.loss,
                gradient=gradient,
                estimator=estimator,
                inputs=inputs,
                generator=distributed.own_generator(self.generator()),
            )
            self._add_share(sums) if several else self._add(sums, self.batches)
        return sums

    def at(self, network: PrunableNetwork) -> "Objective":
        """Return the loss of the network at other values, over the same examples in like chunks."""
        objective = copy(self)
        objective.network, objective._known = network, None
        return objective

    def over(self, batches: Iterable[Batch]) -> "Objective":
        """Return the loss of the same network over other examples, in like chunks."""
        objective = copy(self)
        objective.batches, objective._known = batches, None
        return objective

    @property
    def chance(self) -> float | None:
        """The cross-entropy of guessing, ln C of C classes, once measured; None of other losses."""
        if self.costs is None or not isinstance(self.loss, CrossEntropy):
            return None
        return math.log(self.costs.outputs.shape[self.loss.class_dim])

    def _add(self, sums: Sums, batches: Iterable[Batch]) -> None:
        """Add examples, in chunks that keep to the budget."""
        device = self.network.device
        first, batches = peek(batch.to(device) for batch in batches)
        if first is None:  # this process has no share
            return
        costs = self._probed(sums.network, first, curvature=sums.estimator is not None)
        sums.unrecorded = costs.unrecorded
        if sums.inputs is not None:
            check_seen(costs.elsewhere)
        budget = Budget(self.memory, costs.graph_bytes, costs.column_bytes, costs.passing_bytes)
        columns, most = costs.columns(sums.estimator, self.loss, frugal=self.frugal)
        passes = columns if isinstance(sums.estimator, (Exact, Tolerance)) else 0
        sums.heard = lambda examples: self.heard(examples, passes)
        sums.heard(0)
        if sums.estimator is not None and sums.estimator.packs:
            for batch in regroup(batches, min(_WINDOW, most)):
                sums.add_packed(batch, budget)
        else:
            for batch in regroup(batches, min(budget.examples(columns), most)):
                sums.add(batch, budget)
        sums.note_reached()

    def _add_share(self, sums: Sums) -> None:
        """Add this process's share of the examples.

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

    def _probed(self, network: MaskedNetwork, first: Batch, *, curvature: bool) -> Costs:
        """What the first examples cost: from a measurement before, or found out now."""
        if self.costs is None and self.earlier is not None and self.earlier.kind == first.kind:
            self.costs = self.earlier
        if self.costs is None or (curvature and not self.costs.curvature):
            self.costs = probe(network, first, self.loss, curvature=curvature)
        network.unreached &= self.costs.unreached
        return self.costs


def _means(sums: Sums) -> Statistics:
    """Over the examples of all processes."""
    if distributed.processes() > 1:
        sums.join_()
    statistics = sums.means()
    check_finite(statistics)
    return statistics
