"""What criteria rank by beside the gradient and the GGN diagonal: one entry each.

A criterion names one as its ``statistic``, and gets it in the place of h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossprune.pruning.criteria import Criterion
from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.estimators import EmpiricalFisher
from lossprune.pruning.curvature.examples import regroup
from lossprune.pruning.curvature.measure import Objective
from lossprune.pruning.curvature.network import MaskedNetwork
from lossprune.pruning.curvature.probe import Budget, probe
from lossprune.pruning.curvature.running import evaluating
from lossprune.pruning.errors import PruningError

# What a Hessian-vector product keeps, counted in graphs of a forward pass.
_TWICE = 4


@dataclass(frozen=True)
class Term:
    """What a criterion's formulas get in the place of h.

    Attributes:
        compute: ``compute(objective, mask)`` gives a tensor of every weight's shape, by parameter
            name, at θ ⊙ m; the objective has no examples where no data is given.
        needs_data: whether it takes examples.
    """

    compute: Callable[[Objective, Mapping[str, Tensor]], Mapping[str, Tensor]]
    needs_data: bool = True


def empirical_fisher(objective: Objective, mask: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return F = mean over examples of (∂ℓ/∂θ)²."""
    return objective.measure(mask, estimator=EmpiricalFisher()).ggn_diagonal


def input_norm(objective: Objective, mask: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return ‖x_j‖₂ over all examples and positions, of the input x_j that each weight multiplies.

    Of a convolution j is an input channel at a kernel position; uses of one weight add up.
    """
    return objective.measure(mask, inputs=True).input_norms


def hessian_gradient(objective: Objective, mask: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return H g, with the Hessian H of L and its gradient g in the weights that are left."""
    gradient = objective.measure(mask, gradient=True).gradient
    direction = {name: g * mask[name] for name, g in gradient.items()}
    network = MaskedNetwork(objective.network, mask)
    batches = [batch.to(network.device) for batch in objective.batches]
    if distributed.processes() > 1 and not objective.sharded:
        batches = list(distributed.share(batches))
    product = network.zeros()
    amount = torch.zeros((), dtype=torch.float64, device=network.device)
    with distributed.together(network.device):
        if batches:
            _add_hessian_products_(product, amount, network, batches, objective, direction)
    if distributed.processes() > 1:
        distributed.sum_over_processes_([*product.values(), amount])
    return {name: part / float(amount) for name, part in product.items()}


def _add_hessian_products_(
    product: Mapping[str, Tensor],
    amount: Tensor,
    network: MaskedNetwork,
    batches: Sequence[Batch],
    objective: Objective,
    direction: Mapping[str, Tensor],
) -> None:
    """Add the products of these batches, and what their examples count."""
    loss = objective.loss
    # Of torch's ways to compute attention only the plain one has a second derivative; it costs
    # other memory than the one that the objective measures with, hence a probe of its own.
    with evaluating(objective.network.model), sdpa_kernel(SDPBackend.MATH):
        costs = probe(network, batches[0], loss, curvature=False)
        budget = Budget(objective.memory, _TWICE * costs.graph_bytes, 0)
        for batch in regroup(batches, budget.examples(0)):
            outputs, targets = network(batch)
            total = loss.value(outputs, targets).sum()
            amount += loss.amount(outputs.detach(), targets).sum()
            _add_hessian_product_(product, total, network.weights, direction)


def _add_hessian_product_(
    product: Mapping[str, Tensor],
    total: Tensor,
    weights: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> None:
    """Add ∂(∂total/∂θ · direction)/∂θ."""
    if not total.requires_grad:
        raise PruningError("the loss does not depend on any prunable weight")
    slopes = torch.autograd.grad(
        total, list(weights.values()), create_graph=True, allow_unused=True
    )
    along = [
        (slope * direction[name]).sum()
        for name, slope in zip(weights, slopes, strict=True)
        if slope is not None and slope.requires_grad
    ]
    if not along:  # linear in every weight
        return
    found = torch.autograd.grad(torch.stack(along).sum(), list(weights.values()), allow_unused=True)
    for name, part in zip(weights, found, strict=True):
        if part is not None:
            product[name].add_(part)


def synaptic_flow(objective: Objective, mask: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return ∂R/∂|θ| of R = Σ of the outputs of the network of absolute values on ones.

    Of every parameter and buffer the absolute value is taken, so that no signal cancels; batch
    normalisation is in evaluation mode; everything in double precision, as R grows with depth.
    Of the data the first example counts, for its shape alone: numbers in it that are not whole are
    replaced by ones.
    """
    model = objective.network.model
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_complex():
            raise PruningError(
                f"synaptic flow is one of real numbers, but {name!r} is complex, of "
                f"{tensor.dtype}: take another criterion"
            )
    network = MaskedNetwork(objective.network, mask)
    first = next(iter(objective.batches), None)
    if first is None:
        raise PruningError("the share of a process has no example, and its shape is needed")
    first = first.to(network.device)
    ones = (first if first.size is None else first[:1]).map(
        lambda x: torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x
    )
    network = network.map(lambda x: x.abs().double() if x.is_floating_point() else x)
    with evaluating(model):
        outputs, _ = network(ones)
        weights = list(network.weights.values())
        found = torch.autograd.grad(outputs.sum(), weights, allow_unused=True)
    zero = torch.zeros((), dtype=torch.float64, device=network.device)
    return {
        name: zero.expand_as(weight) if part is None else part
        for (name, weight), part in zip(network.weights.items(), found, strict=True)
    }


def uniform(objective: Objective, mask: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return independent numbers, uniform in [0, 1)."""
    generator = objective.generator()
    return {  # drawn on the CPU, so that every device gets the same
        name: torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
        for name, weight in objective.network.weights.items()
    }


TERMS: dict[str, Term] = {
    "empirical-fisher": Term(empirical_fisher),
    "input-norm": Term(input_norm),
    "hessian-gradient": Term(hessian_gradient),
    "synaptic-flow": Term(synaptic_flow),
    "uniform": Term(uniform, needs_data=False),
}
STATISTICS = TERMS  # the name in the public API


def term_of(
    criterion: Criterion, objective: Objective, mask: Mapping[str, Tensor]
) -> Mapping[str, Tensor] | None:
    """Return what the criterion ranks by instead of the curvature at θ ⊙ m, if anything.

    Of several processes all get what the first one has found.
    """
    if criterion.statistic is None:
        return None
    term = TERMS[criterion.statistic]
    with distributed.together(objective.network.device):
        found = term.compute(objective, mask)
    found = {name: values.contiguous() for name, values in found.items()}
    distributed.as_the_first_has_(found.values())
    return found
