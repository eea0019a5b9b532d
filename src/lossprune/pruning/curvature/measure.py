"""Measuring a network on data: mean loss, its gradient and the diagonal of its GGN matrix."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.any_function import AnyFunction
from lossprune.pruning.curvature.batch import Batch, Forward
from lossprune.pruning.curvature.budget import Budget
from lossprune.pruning.curvature.columns import Columns
from lossprune.pruning.curvature.estimators import Estimator, find_estimator
from lossprune.pruning.curvature.examples import NO_EXAMPLES, peek, regroup, take
from lossprune.pruning.curvature.layers import LayerCalls
from lossprune.pruning.curvature.losses import FullLoss, Loss, LossFunction, find_loss
from lossprune.pruning.curvature.network import Network, check_outputs
from lossprune.pruning.curvature.passes import add_squared_gradients_
from lossprune.pruning.curvature.plainly import outside_inference
from lossprune.pruning.curvature.reach import NOTHING
from lossprune.pruning.errors import PruningError
from lossprune.pruning.prunable import Choices
from lossprune.pruning.randomness import PrivateRandomness

# The default of `memory`: beyond these a measurement does not get faster.
MEMORY = {"cpu": 256 << 20, "cuda": 4 << 30}
# Examples whose columns an estimator that packs chooses, and sorts, together.
_WINDOW = 8192
# Elements of outputs, and of what is computed from them in double precision, at a time.
_OUTPUTS = 1 << 22


@dataclass(frozen=True)
class Statistics:
    """What was measured, over ``examples`` examples.

    Attributes:
        loss: mean loss; over examples, or over what the loss counts (see the loss).
        gradient: ∂L/∂θ by parameter name; empty if not asked for.
        ggn_diagonal: diag(G) by parameter name; empty if not asked for.  What a mask removes is
            measured or not, as it falls: nothing is said of it.
        examples: how many examples the means are over.
        skipped: share of the output Hessian's trace that the estimator left out.
        unused: names of the weights that the outputs of no example depend on in evaluation mode,
            by the graph (a layer behind a ReLU that is shut is not among them); none where the
            outputs depend on no weight at all.
    """

    loss: float
    gradient: Mapping[str, Tensor]
    ggn_diagonal: Mapping[str, Tensor]
    examples: int
    skipped: float = 0.0
    unused: tuple[str, ...] = ()


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

    one backward pass a column, with gradients at the layers' outputs only.  Source: Schraudolph,
    "Fast curvature matrix-vector products", 2002; the column form as in Dangel et al., "BackPACK",
    2020; the computation is described in docs/curvature.md.

    Under an initialised ``torch.distributed`` group every process must call this, with the same
    batches, of each of which it takes its part, or with ``sharded`` and batches of its own; all
    return the same sums.  What an estimator draws depends on how many they are.

    Args:
        model: left as it is, its gradients, hooks, mode and buffers included; measured in
            evaluation mode.  The first dimension of every layer's input must be the examples.
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
            network, its statistics and the batches; 256 MiB on a CPU and 4 GiB on a GPU if not
            given.  At least one example and one column are always taken.
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
            with a sampler that divides it; outputs or targets that the loss cannot take; a prunable
            weight used outside a linear or convolution function, or under examples that are not
            independent (named); a loss, gradient or curvature that is not finite (named).

    >>> from torch import nn
    >>> model = nn.Linear(4, 3)
    >>> stats = measure(model, [(torch.randn(8, 4), torch.arange(8) % 3)])
    >>> stats.examples, stats.ggn_diagonal["weight"].shape
    (8, torch.Size([3, 4]))
    """
    network = Network(model, mask, forward, parameters, exclude)
    if gradient or ggn_diagonal:
        _check_real(network.weights)
    if memory is None:
        memory = MEMORY.get(network.device.type, MEMORY["cuda"])
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(f"memory must be a whole number of bytes, at least 1, got {memory!r}")
    measurement = _Measurement(
        network,
        find_loss(loss),
        find_estimator(estimator) if ggn_diagonal else None,
        gradient,
        memory,
        generator or torch.default_generator,
    )
    if not sharded:
        distributed.check_undivided(batches)
    # Processes that measure together draw together: their loaders shuffle alike.
    with PrivateRandomness(distributed.shared_random_state()), network.evaluating():
        given = take(batches, examples, forward, sharded=sharded)
        if distributed.processes() > 1:
            measurement.add_share(given, sharded=sharded)
        else:
            measurement.add(given)
    statistics = measurement.means()
    _check_finite(statistics)
    return statistics


def mean_loss(
    model: nn.Module,
    batches: Iterable[Any],
    examples: int | None = None,
    *,
    mask: Mapping[str, Tensor] | None = None,
    loss: str | Loss | LossFunction = "cross_entropy",
    memory: int | None = None,
    forward: Forward | None = None,
    parameters: Choices | None = None,
    sharded: bool = False,
) -> float:
    """Return the mean loss alone; arguments as :func:`measure`."""
    return measure(
        model,
        batches,
        examples,
        mask=mask,
        loss=loss,
        gradient=False,
        ggn_diagonal=False,
        memory=memory,
        forward=forward,
        parameters=parameters,
        sharded=sharded,
    ).loss


def _check_real(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all are real: the models of the loss are of real weights."""
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise PruningError(
                f"{name!r} is complex, of {tensor.dtype}, where the loss has no gradient or "
                f"curvature to prune by: take MP or random, or exclude={name!r}"
            )


def _check_finite(statistics: Statistics) -> None:
    if not math.isfinite(statistics.loss):
        raise PruningError(f"the loss is not finite ({statistics.loss})")
    for what in ("gradient", "ggn_diagonal"):
        for name, tensor in getattr(statistics, what).items():
            bad = tensor.numel() - int(tensor.isfinite().sum())
            if bad:
                raise PruningError(
                    f"the {what.replace('ggn_diagonal', 'curvature')} of {name!r} is not finite "
                    f"in {bad} of {tensor.numel()} entries"
                )


class _Measurement:
    """Running sums over the examples read so far."""

    def __init__(
        self,
        network: Network,
        loss: FullLoss,
        estimator: Estimator | None,
        gradient: bool,
        memory: int,
        generator: torch.Generator,
    ) -> None:
        self.network = network
        self.loss = loss
        self.estimator = estimator
        self.memory = memory
        self.generator = generator
        # loss, examples, trace of the output Hessian, share of it that was skipped, what the
        # examples count
        self.scalars = torch.zeros(5, dtype=torch.float64, device=network.device)
        self.gradient = network.zeros() if gradient else {}
        self.ggn_diagonal = network.zeros() if estimator else {}
        # in how many processes the outputs depend on each weight
        self.reached = torch.zeros(len(network.weights), dtype=torch.float64, device=network.device)

    def add(self, batches: Iterable[Batch]) -> None:
        """Add examples, in chunks that keep to the budget."""
        device = self.network.device
        first, batches = peek(batch.to(device) for batch in batches)
        if first is None:  # this process has no share
            return
        budget, columns, most = self._plan(first)
        if self.estimator is not None and self.estimator.packs:
            for batch in regroup(batches, min(_WINDOW, most)):
                self._add_packed(batch, budget)
        else:
            for batch in regroup(batches, min(budget.examples(columns), most)):
                self._add_chunk(batch, budget)
        names = self.network.weights
        self.reached += self.reached.new_tensor([n not in self.network.unreached for n in names])

    def add_share(self, batches: Iterator[Batch], *, sharded: bool) -> None:
        """Add this process's share of the examples, and everybody else's sums.

        With ``sharded`` the batches are the share, else those of all, which must be alike.
        """
        device = self.network.device
        self.generator = distributed.own_generator(self.generator)
        if not sharded:
            with distributed.together(device):
                first = next(batches, None)
            distributed.check_alike(first, device)
            batches = distributed.share(chain([first] if first else [], batches))
        with distributed.together(device):
            self.add(batches)
        distributed.sum_over_processes_(
            [self.scalars, self.reached, *self.gradient.values(), *self.ggn_diagonal.values()]
        )

    def means(self) -> Statistics:
        """Return the sums, each divided by the number of examples."""
        loss, examples, trace, skipped, amount = self.scalars.tolist()
        if examples == 0:
            raise PruningError(NO_EXAMPLES)
        if amount == 0:
            raise PruningError("no target counts: all are ignored, or of classes of weight 0")
        for total in (*self.gradient.values(), *self.ggn_diagonal.values()):
            total /= amount
        return Statistics(
            loss / amount,
            self.gradient,
            self.ggn_diagonal,
            int(examples),
            skipped / trace if trace else 0.0,
            self._unused(),
        )

    def _unused(self) -> tuple[str, ...]:
        reached = self.reached.tolist()
        if not any(reached):
            if self.gradient or self.estimator is not None:
                raise PruningError(NOTHING)
            return ()
        names = self.network.weights
        return tuple(name for name, times in zip(names, reached, strict=True) if not times)

    def _plan(self, batch: Batch) -> tuple[Budget, int, int]:
        """Check the network on the first examples.

        Return its costs, the columns of an example, and how many examples may go together.
        """
        costs = self.network.probe(batch, self.loss, curvature=self.estimator is not None)
        budget = Budget(self.memory, costs.graph_bytes, costs.column_bytes)
        outputs = costs.outputs
        if self.estimator is None:
            return budget, 0, sys.maxsize
        columns = self.estimator.columns(outputs, costs.targets, self.loss, torch.Generator())
        # One example alone does not show whether examples interact, so none go together.
        most = 1 if len(outputs) == 1 else sys.maxsize
        if outputs.ndim > 2 and self.estimator.packs:  # its columns are written out in full
            most = min(most, max(1, _OUTPUTS // (outputs[0].numel() ** 2)))
        return budget, len(columns.keys()), most

    def _add_chunk(self, batch: Batch, budget: Budget, columns: Columns | None = None) -> None:
        """Add a chunk's examples; their columns are chosen here unless given."""
        # A weight that the first few examples do not need may be one that others do: an expert's.
        looks = bool(self.network.unreached)
        differentiates = looks or bool(self.gradient) or self.estimator is not None
        with (
            torch.set_grad_enabled(differentiates),
            LayerCalls(self.network.weights if self.estimator else {}) as recorder,
        ):
            outputs, targets = self.network(batch)
        if looks:
            self.network.note_reached(outputs)
        for call in recorder.calls:
            call.check()
            call.check_rows(len(outputs))
        logits = outputs.detach()
        check_outputs(logits, targets, batch, self.loss)
        self.scalars[0] += self._values(logits, targets).detach().sum()
        self.scalars[1] += len(logits)
        self.scalars[4] += self.loss.amount(logits, targets).sum()
        if not outputs.requires_grad:  # nothing was asked for, or no layer reaches the outputs
            return
        if self.gradient:
            self._add_gradient(outputs, targets)
        if self.estimator is not None:
            if columns is None:
                columns = self.estimator.columns(logits, targets, self.loss, self.generator)
            add_squared_gradients_(
                self.ggn_diagonal, outputs, recorder.calls, columns, budget, self.network.kept
            )

    def _values(self, logits: Tensor, targets: Any) -> Tensor:
        """The loss of each example, in double precision."""
        if isinstance(self.loss, AnyFunction):  # which may have numbers of its own in it
            return self.loss.value(logits, targets).double()
        size = max(1, _OUTPUTS // max(1, logits[0].numel()))
        if len(logits) <= size:
            return self.loss.value(logits.double(), targets)
        return torch.cat(
            [
                self.loss.value(
                    logits[start : start + size].double(), targets[start : start + size]
                )
                for start in range(0, len(logits), size)
            ]
        )

    def _add_gradient(self, outputs: Tensor, targets: Any) -> None:
        """Let autograd add to the sums in place, layer by layer."""
        weights = self.network.weights
        for name, total in self.gradient.items():
            if weights[name].dtype == total.dtype and weights[name].stride() == total.stride():
                weights[name].grad = total
        torch.autograd.backward(
            outputs,
            self.loss.gradient(outputs.detach(), targets),
            retain_graph=True,
            inputs=list(weights.values()),
        )
        for name, total in self.gradient.items():
            part = weights[name].grad
            if part is not None and part is not total:
                total += part
            weights[name].grad = None

    def _add_packed(self, batch: Batch, budget: Budget) -> None:
        """Choose the columns of many examples first, then take those with as many together."""
        assert self.estimator is not None
        if batch.size is None:
            raise PruningError(
                "an estimator that chooses among the columns of many examples needs batches made "
                "of tensors with one entry per example in tuples, lists or dicts"
            )
        size = budget.examples(1)
        with torch.no_grad():
            parts = [self.network(batch[i : i + size]) for i in range(0, len(batch), size)]
        outputs = torch.cat([part for part, _ in parts])
        targets = torch.cat([part for _, part in parts])
        check_outputs(outputs, targets, batch, self.loss)
        columns = self.estimator.columns(outputs, targets, self.loss, self.generator)
        self.scalars[2] += columns.trace
        self.scalars[3] += columns.skipped
        for chosen, count in columns.packed(budget.examples):
            self._add_chunk(batch[chosen], budget, Columns(columns.vectors[chosen, :count]))
