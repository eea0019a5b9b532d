"""Measuring a network on data: mean loss, its gradient and the diagonal of its GGN matrix."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.budget import Budget
from lossprune.pruning.curvature.estimators import Estimator, find_estimator
from lossprune.pruning.curvature.examples import Batch, peek, regroup, take
from lossprune.pruning.curvature.layers import LayerCalls
from lossprune.pruning.curvature.losses import Loss, find_loss
from lossprune.pruning.curvature.network import Network
from lossprune.pruning.curvature.passes import add_squared_gradients_
from lossprune.pruning.errors import PruningError
from lossprune.pruning.randomness import PrivateRandomness

# The default of `memory`: beyond these a measurement does not get faster.
MEMORY = {"cpu": 256 << 20, "cuda": 4 << 30}
# Examples whose columns an estimator that packs chooses, and sorts, together.
_WINDOW = 8192


@dataclass(frozen=True)
class Statistics:
    """What was measured, over ``examples`` examples.

    Attributes:
        loss: mean loss.
        gradient: ∂L/∂θ by parameter name; empty if not asked for.
        ggn_diagonal: diag(G) by parameter name; empty if not asked for.  What a mask removes is
            measured or not, as it falls: nothing is said of it.
        examples: how many examples the means are over.
        skipped: share of the output Hessian's trace that the estimator left out.
    """

    loss: float
    gradient: Mapping[str, Tensor]
    ggn_diagonal: Mapping[str, Tensor]
    examples: int
    skipped: float = 0.0


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    examples: int | None = None,
    *,
    mask: Mapping[str, Tensor] | None = None,
    loss: str | Loss = "cross_entropy",
    gradient: bool = True,
    ggn_diagonal: bool = True,
    estimator: str | Estimator = "exact",
    memory: int | None = None,
    generator: torch.Generator | None = None,
) -> Statistics:
    r"""Measure loss, gradient and GGN diagonal of a network's prunable weights.

    With the loss ℓ of one example, the Jacobian J of its outputs and the Hessian H of ℓ in the
    outputs, the generalised Gauss-Newton matrix is G = mean over examples of Jᵀ H J.  H = S Sᵀ for
    a factor S with a column for each rank of H, hence

        diag(G) = mean over examples of Σ_k (Jᵀ S_k)²,

    one backward pass a column, with gradients at the layers' outputs only.  Source: Schraudolph,
    "Fast curvature matrix-vector products", 2002; the column form as in Dangel et al., "BackPACK",
    2020; the computation is described in docs/curvature.md.

    Under an initialised ``torch.distributed`` group every process must call this with the same
    batches; each takes its part of every batch, and all return the same sums.

    Args:
        model: left as it is, its gradients, hooks, mode and buffers included; measured in
            evaluation mode.  The first dimension of every layer's input must be the examples.
        batches: (inputs, targets) pairs; moved to the network's device as needed.
        examples: how many to read, exactly (the last batch is cut); None reads all.
        mask: weights to take as 0, by parameter name, True where kept.
        loss: a name in ``LOSSES`` or a :class:`Loss`.
        gradient: whether to measure the gradient.
        ggn_diagonal: whether to measure the GGN diagonal.
        estimator: of the GGN diagonal: a name in ``ESTIMATORS`` or an :class:`Estimator`.
        memory: bytes that activations, gradients and products may take at once, beside the
            network, its statistics and the batches; 256 MiB on a CPU and 4 GiB on a GPU if not
            given.  At least one example and one column are always taken.
        generator: CPU generator of what the estimator draws; torch's global one if not given.

    Raises:
        PruningError: too few examples; outputs or targets that the loss cannot take; a prunable
            weight used outside a linear or convolution function, or under examples that are not
            independent (named); a loss, gradient or curvature that is not finite (named).

    >>> from torch import nn
    >>> model = nn.Linear(4, 3)
    >>> stats = measure(model, [(torch.randn(8, 4), torch.arange(8) % 3)])
    >>> stats.examples, stats.ggn_diagonal["weight"].shape
    (8, torch.Size([3, 4]))
    """
    network = Network(model, mask)
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
    with PrivateRandomness(), network.evaluating():
        if distributed.processes() > 1:
            measurement.add_share(take(batches, examples))
        else:
            measurement.add(take(batches, examples))
    statistics = measurement.means()
    _check_finite(statistics)
    return statistics


def mean_loss(
    model: nn.Module,
    batches: Iterable[Any],
    examples: int | None = None,
    *,
    mask: Mapping[str, Tensor] | None = None,
    loss: str | Loss = "cross_entropy",
    memory: int | None = None,
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
    ).loss


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
        loss: Loss,
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
        # loss, examples, trace of the output Hessian, share of it that was skipped
        self.scalars = torch.zeros(4, dtype=torch.float64, device=network.device)
        self.gradient = network.zeros() if gradient else {}
        self.ggn_diagonal = network.zeros() if estimator else {}

    def add(self, batches: Iterable[Batch]) -> None:
        """Add examples, in chunks that keep to the budget."""
        device = self.network.device
        placed = ((inputs.to(device), targets.to(device)) for inputs, targets in batches)
        first, batches = peek(placed)
        if first is None:  # this process has no share
            return
        budget, columns = self._plan(*first)
        if self.estimator is not None and self.estimator.packs:
            for inputs, targets in regroup(batches, _WINDOW):
                self._add_packed(inputs, targets, budget)
        else:
            for inputs, targets in regroup(batches, budget.examples(columns)):
                self._add_chunk(inputs, targets, budget)

    def add_share(self, batches: Iterable[Batch]) -> None:
        """Add this process's share of the examples, and everybody else's sums."""
        error = None
        try:
            self.add(distributed.share(batches))
        except PruningError as raised:
            error = raised
        distributed.raise_together(error, self.network.device)
        distributed.sum_over_processes_(
            [self.scalars, *self.gradient.values(), *self.ggn_diagonal.values()]
        )

    def means(self) -> Statistics:
        """Return the sums, each divided by the number of examples."""
        loss, examples, trace, skipped = self.scalars.tolist()
        for total in (*self.gradient.values(), *self.ggn_diagonal.values()):
            total /= examples
        return Statistics(
            loss / examples,
            self.gradient,
            self.ggn_diagonal,
            int(examples),
            skipped / trace if trace else 0.0,
        )

    def _plan(self, inputs: Tensor, targets: Tensor) -> tuple[Budget, int]:
        """Check the network on the first examples; return its costs and columns per example."""
        costs = self.network.probe(inputs, targets, self.loss, curvature=self.estimator is not None)
        budget = Budget(self.memory, costs.graph_bytes, costs.column_bytes)
        if self.estimator is None:
            return budget, 0
        few = targets[: len(costs.outputs)]
        columns = self.estimator.columns(costs.outputs, few, self.loss, torch.Generator())
        return budget, columns.vectors.shape[1]

    def _add_chunk(
        self, inputs: Tensor, targets: Tensor, budget: Budget, columns: Tensor | None = None
    ) -> None:
        """Add a chunk's examples; their columns are chosen here unless given, (n, k, c)."""
        differentiates = bool(self.gradient) or self.estimator is not None
        with (
            torch.set_grad_enabled(differentiates),
            LayerCalls(self.network.weights if self.estimator else {}) as recorder,
        ):
            outputs = self.network(inputs)
        for call in recorder.calls:
            call.check()
        logits = outputs.detach()
        self.loss.check(logits, targets)
        self.scalars[0] += self.loss.value(logits.double(), targets).sum()
        self.scalars[1] += len(targets)
        if not outputs.requires_grad:  # nothing was asked for, or no layer reaches the outputs
            return
        if self.gradient:
            self._add_gradient(outputs, targets)
        if self.estimator is not None:
            if columns is None:
                columns = self.estimator.columns(logits, targets, self.loss, self.generator).vectors
            add_squared_gradients_(
                self.ggn_diagonal, outputs, recorder.calls, columns, budget, self.network.kept
            )

    def _add_gradient(self, outputs: Tensor, targets: Tensor) -> None:
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

    def _add_packed(self, inputs: Tensor, targets: Tensor, budget: Budget) -> None:
        """Choose the columns of many examples first, then take those with as many together."""
        assert self.estimator is not None
        size = budget.examples(1)
        with torch.no_grad():
            outputs = torch.cat([self.network(part) for part in inputs.split(size)])
        self.loss.check(outputs, targets)
        columns = self.estimator.columns(outputs, targets, self.loss, self.generator)
        self.scalars[2] += columns.trace
        self.scalars[3] += columns.skipped
        for chosen, count in columns.packed(budget.examples):
            self._add_chunk(
                inputs[chosen], targets[chosen], budget, columns.vectors[chosen, :count]
            )
