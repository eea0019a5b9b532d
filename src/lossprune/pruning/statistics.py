"""What criteria rank by beside the gradient and the GGN diagonal: one entry each.

A criterion names one as its ``statistic``, and gets it in the place of h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch, Forward
from lossprune.pruning.curvature.budget import Budget
from lossprune.pruning.curvature.examples import regroup
from lossprune.pruning.curvature.losses import FullLoss
from lossprune.pruning.curvature.measure import MEMORY, measure
from lossprune.pruning.curvature.network import Network
from lossprune.pruning.errors import PruningError

# What a Hessian-vector product keeps, counted in graphs of a forward pass.
_TWICE = 4


@dataclass(frozen=True)
class Setting:
    """What a stage measures: a network at θ ⊙ m, and its examples.

    Attributes:
        weights: the prunable weights, by parameter name.
        batches: none where no data is given.
        generator: CPU generator of whatever is drawn.
        sharded: whether the batches are this process's share of the data of several.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    mask: Mapping[str, Tensor]
    batches: Sequence[Batch]
    loss: FullLoss
    forward: Forward | None
    memory: int | None
    generator: torch.Generator
    sharded: bool = False


@dataclass(frozen=True)
class Statistic:
    """A tensor of every weight's shape, by parameter name, and whether data is needed for it."""

    compute: Callable[[Setting], Mapping[str, Tensor]]
    needs_data: bool = True


def empirical_fisher(setting: Setting) -> Mapping[str, Tensor]:
    """Return F = mean over examples of (∂ℓ/∂θ)²."""
    return measure(
        setting.model,
        setting.batches,
        mask=setting.mask,
        loss=setting.loss,
        forward=setting.forward,
        gradient=False,
        estimator="empirical-fisher",
        memory=setting.memory,
        parameters=tuple(setting.weights),
        sharded=setting.sharded,
    ).ggn_diagonal


def hessian_gradient(setting: Setting) -> Mapping[str, Tensor]:
    """Return H g, with the Hessian H of L and its gradient g in the weights that are left."""
    found = measure(
        setting.model,
        setting.batches,
        mask=setting.mask,
        loss=setting.loss,
        forward=setting.forward,
        ggn_diagonal=False,
        memory=setting.memory,
        parameters=tuple(setting.weights),
        sharded=setting.sharded,
    )
    network = Network(setting.model, setting.mask, setting.forward, tuple(setting.weights))
    batches = [batch.to(network.device) for batch in setting.batches]
    if distributed.processes() > 1 and not setting.sharded:
        batches = list(distributed.share(batches))
    direction = {name: g * setting.mask[name] for name, g in found.gradient.items()}
    product = network.zeros()
    amount = torch.zeros((), dtype=torch.float64, device=network.device)
    with distributed.together(network.device):
        if batches:
            _add_hessian_products_(product, amount, network, batches, setting, direction)
    if distributed.processes() > 1:
        distributed.sum_over_processes_([*product.values(), amount])
    return {name: part / float(amount) for name, part in product.items()}


def _add_hessian_products_(
    product: Mapping[str, Tensor],
    amount: Tensor,
    network: Network,
    batches: Sequence[Batch],
    setting: Setting,
    direction: Mapping[str, Tensor],
) -> None:
    """Add the products of these batches, and what their examples count."""
    # Of torch's ways to compute attention only the plain one has a second derivative.
    with network.evaluating(), sdpa_kernel(SDPBackend.MATH):
        costs = network.probe(batches[0], setting.loss, curvature=False)
        memory = setting.memory or MEMORY.get(network.device.type, MEMORY["cuda"])
        budget = Budget(memory, _TWICE * costs.graph_bytes, 0)
        for batch in regroup(batches, budget.examples(0)):
            outputs, targets = network(batch)
            total = setting.loss.value(outputs, targets).sum()
            amount += setting.loss.amount(outputs.detach(), targets).sum()
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


def synaptic_flow(setting: Setting) -> Mapping[str, Tensor]:
    """Return ∂R/∂|θ| of R = Σ of the outputs of the network of absolute values on ones.

    Of every parameter and buffer the absolute value is taken, so that no signal cancels; batch
    normalisation is in evaluation mode; everything in double precision, as R grows with depth.
    Of the data the first example counts, for its shape alone: numbers in it that are not whole are
    replaced by ones.
    """
    for name, tensor in (*setting.model.named_parameters(), *setting.model.named_buffers()):
        if tensor.is_complex():
            raise PruningError(
                f"synaptic flow is one of real numbers, but {name!r} is complex, of "
                f"{tensor.dtype}: take another criterion"
            )
    network = Network(setting.model, setting.mask, setting.forward, tuple(setting.weights))
    if not setting.batches:
        raise PruningError("the share of a process has no example, and its shape is needed")
    first = setting.batches[0].to(network.device)
    ones = (first if first.size is None else first[:1]).map(
        lambda x: torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x
    )
    network = network.map(lambda x: x.abs().double() if x.is_floating_point() else x)
    with network.evaluating():
        outputs, _ = network(ones)
        weights = list(network.weights.values())
        found = torch.autograd.grad(outputs.sum(), weights, allow_unused=True)
    zero = torch.zeros((), dtype=torch.float64, device=network.device)
    return {
        name: zero.expand_as(weight) if part is None else part
        for (name, weight), part in zip(network.weights.items(), found, strict=True)
    }


def uniform(setting: Setting) -> Mapping[str, Tensor]:
    """Return independent numbers, uniform in [0, 1)."""
    return {  # drawn on the CPU, so that every device gets the same
        name: torch.rand(weight.shape, generator=setting.generator, dtype=torch.float64).to(
            weight.device
        )
        for name, weight in setting.weights.items()
    }


STATISTICS: dict[str, Statistic] = {
    "empirical-fisher": Statistic(empirical_fisher),
    "hessian-gradient": Statistic(hessian_gradient),
    "synaptic-flow": Statistic(synaptic_flow),
    "uniform": Statistic(uniform, needs_data=False),
}


def find_statistic(name: str) -> Statistic:
    """Return the statistic of that name.

    Raises:
        ValueError: a name that is not in :data:`STATISTICS`.
    """
    if name not in STATISTICS:
        raise ValueError(f"unknown statistic {name!r}; choose one of: {', '.join(STATISTICS)}")
    return STATISTICS[name]
