"""Products with the GGN matrix: G v = mean over examples of Jᵀ H (J v), no matrix ever formed.

J v is a forward-mode pass, Jᵀ u a reverse-mode one.  Where the network has an operation without a
forward-mode derivative, J v is found from two reverse-mode passes: u ↦ Jᵀ u is linear, and the
gradient of (Jᵀ u)ᵀ v in u is J v.  Source: Schraudolph, "Fast curvature matrix-vector products",
2002; the second form as in Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossprune.pruning.curvature import distributed
from lossprune.pruning.curvature.batch import Batch
from lossprune.pruning.curvature.examples import regroup
from lossprune.pruning.curvature.losses import FullLoss
from lossprune.pruning.curvature.network import MaskedNetwork
from lossprune.pruning.curvature.probe import Budget, probe
from lossprune.pruning.curvature.running import evaluating
from lossprune.pruning.errors import PruningError

# What a product keeps, counted in graphs of a forward pass: that of the outputs, and of J v.
_GRAPHS = 3

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Expansion:
    """What the loss is, to second order, along a direction v: L + gᵀv + ½ vᵀGv.

    Attributes:
        slope: g + G v, by parameter name.
        linear: gᵀv.
        quadratic: vᵀGv.
    """

    slope: dict[str, Tensor]
    linear: float
    quadratic: float


class GaussNewton:
    """Gradient g and GGN matrix G of a network's mean loss at θ ⊙ m, as products.

    Under ``torch.distributed`` each process takes its share of the examples, and all get the same
    sums.

    Args:
        network: at θ ⊙ m; its ``weights`` are what g and G are of.
        batches: the examples: of this process where they are ``sharded``, else of all.
        loss: whose Hessian in the outputs is known.
        memory: bytes that a product may take at once, beside the network and vectors of its size.
        sharded: as in :func:`lossprune.measure`.
    """

    def __init__(
        self,
        network: MaskedNetwork,
        batches: Sequence[Batch],
        loss: FullLoss,
        *,
        memory: int,
        sharded: bool,
    ) -> None:
        self.network, self.loss = network, loss
        self._along = _along_forward
        device = network.device
        with distributed.together(device):
            batches = [batch.to(device) for batch in batches]
            if distributed.processes() > 1 and not sharded:
                batches = list(distributed.share(batches))
            self._chunks = self._chunked(batches, memory)

    def product(self, direction: Tensors) -> dict[str, Tensor]:
        """Return G v, by parameter name; of what v has no entry for, 0 is taken."""
        return self._expanded(direction, gradient=False).slope

    def expansion(self, direction: Tensors) -> Expansion:
        """Return g + G v, gᵀv and vᵀGv."""
        return self._expanded(direction, gradient=True)

    def sketched_diagonal(self, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return an unbiased estimate of diag(G), never negative, from so many backward passes.

        With vectors s_n of mean 0 and covariance H, independent between examples, (Σ_n Jᵀ s_n)²
        has mean Σ_n diag(Jᵀ H J): a pass for all examples, whatever uses a weight has.
        """
        generator = distributed.own_generator(generator)
        diagonal = self.network.zeros()
        for _ in range(draws):
            sums = _Sums(self.network)
            with self._running():
                for chunk in self._chunks:
                    outputs, targets = self.network(chunk)
                    sums.count(self.loss, outputs, targets)
                    drawn = self.loss.draw(outputs.detach(), targets, 1, generator)[:, 0]
                    for total, part in self._backward(sums.totals, outputs, drawn):
                        total.add_(part)
            totals, amount = sums.joined()
            for name, total in totals.items():
                diagonal[name].addcmul_(total, total, value=1 / (draws * amount))
        return diagonal

    def _chunked(self, batches: Sequence[Batch], memory: int) -> list[Batch]:
        if not batches:  # this process has no share
            return []
        with _plainly(self.network):
            # Attention is computed otherwise than where there is no second derivative to take.
            costs = probe(self.network, batches[0], self.loss, curvature=False)
            few = batches[0] if batches[0].size is None else batches[0][: len(costs.outputs)]
            self._along = _way_along(self.network, few, self.loss)
        size = Budget(memory, _GRAPHS * costs.graph_bytes, 0).examples(0)
        return list(regroup(batches, size))

    def _expanded(self, direction: Tensors, *, gradient: bool) -> Expansion:
        sums = _Sums(self.network)
        with self._running():
            for chunk in self._chunks:
                outputs, targets, along = self._along(self.network, chunk, direction)
                logits = outputs.detach()
                sums.count(self.loss, logits, targets)
                curved = self.loss.hessian_product(logits, targets, along)
                sums.scalars[2] += (curved.double() * along).sum()
                if gradient:
                    slope = self.loss.gradient(logits, targets)
                    sums.scalars[1] += (slope.double() * along).sum()
                    curved = curved + slope
                for total, part in self._backward(sums.totals, outputs, curved):
                    total.add_(part)
        slopes, linear, quadratic = sums.means()
        return Expansion(slopes, linear, quadratic)

    def _backward(
        self, totals: Tensors, outputs: Tensor, vector: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a total and what a backward pass gives for it."""
        if not outputs.requires_grad:
            return
        weights = list(self.network.weights.values())
        found = torch.autograd.grad(
            outputs, weights, vector.to(outputs.dtype), retain_graph=True, allow_unused=True
        )
        for name, part in zip(self.network.weights, found, strict=True):
            if part is not None:
                yield totals[name], part

    @contextmanager
    def _running(self) -> Iterator[None]:
        with distributed.together(self.network.device), _plainly(self.network):
            yield


class _Sums:
    """Sums over this process's examples, and their means over everybody's."""

    def __init__(self, network: MaskedNetwork) -> None:
        self.totals = network.zeros()
        # what the examples count, gᵀv, vᵀGv
        self.scalars = torch.zeros(3, dtype=torch.float64, device=network.device)

    def count(self, loss: FullLoss, outputs: Tensor, targets: Any) -> None:
        self.scalars[0] += loss.amount(outputs.detach(), targets).sum()

    def joined(self) -> tuple[dict[str, Tensor], float]:
        """The sums over everybody's examples, and what these count."""
        if distributed.processes() > 1:
            distributed.sum_over_processes_([self.scalars, *self.totals.values()])
        amount = float(self.scalars[0])
        if amount == 0:
            raise PruningError("no target counts: all are ignored, or of classes of weight 0")
        return self.totals, amount

    def means(self) -> tuple[dict[str, Tensor], float, float]:
        totals, amount = self.joined()
        for total in totals.values():
            total /= amount
        return totals, float(self.scalars[1]) / amount, float(self.scalars[2]) / amount


Along = Callable[[MaskedNetwork, Batch, Tensors], tuple[Tensor, Any, Tensor]]


def _along_forward(
    network: MaskedNetwork, batch: Batch, direction: Tensors
) -> tuple[Tensor, Any, Tensor]:
    """Outputs with their graph, targets, and J v, by a forward-mode pass."""
    with forward_ad.dual_level():
        outputs, targets = network.along(direction)(batch)
        primal, tangent = forward_ad.unpack_dual(outputs)
        tangent = torch.zeros_like(primal) if tangent is None else tangent
    return primal, targets, tangent.detach()


def _along_backward(
    network: MaskedNetwork, batch: Batch, direction: Tensors
) -> tuple[Tensor, Any, Tensor]:
    """The same by two reverse-mode passes."""
    outputs, targets = network(batch)
    u = torch.zeros_like(outputs, requires_grad=True)
    weights = {name: weight for name, weight in network.weights.items() if name in direction}
    found = torch.autograd.grad(
        outputs, list(weights.values()), u, create_graph=True, allow_unused=True
    )
    along = [
        (part * direction[name].to(part.dtype)).sum()
        for name, part in zip(weights, found, strict=True)
        if part is not None and part.requires_grad
    ]
    if not along:
        return outputs, targets, torch.zeros_like(outputs)
    (tangent,) = torch.autograd.grad(torch.stack(along).sum(), u, retain_graph=True)
    return outputs, targets, tangent


def _way_along(network: MaskedNetwork, few: Batch, loss: FullLoss) -> Along:
    """How J v is to be found for this network, tried on a few examples.

    Raises:
        PruningError: neither way does, or what it gives does not fit Jᵀ u, as of an operation of
            one's own whose derivatives contradict each other.
    """
    problem = None
    for along in (_along_forward, _along_backward):
        try:
            _check_transposed(network, few, along)
        except (PruningError, RuntimeError) as error:  # torch's, of what has no such derivative
            problem = problem or error
        else:
            return along
    raise PruningError(
        f"products with the curvature of this network cannot be computed: {problem}"
    ) from problem


def _check_transposed(network: MaskedNetwork, few: Batch, way: Along) -> None:
    """Raise unless uᵀ(J v) = (Jᵀu)ᵀv for some u and v."""
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
        for name, weight in network.weights.items()
    }
    outputs, _, along = way(network, few, direction)
    if not outputs.requires_grad or not along.isfinite().all():
        return  # what is not finite is told of where the loss is
    u = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    weights = list(network.weights.values())
    found = torch.autograd.grad(outputs, weights, u, allow_unused=True)
    parts = [
        (part.double() * direction[name].double()).sum()
        for name, part in zip(network.weights, found, strict=True)
        if part is not None
    ]
    sizes = [
        (part.double() * direction[name].double()).square().sum()
        for name, part in zip(network.weights, found, strict=True)
        if part is not None
    ]
    one, other = (u.double() * along.double()).sum(), torch.stack(parts).sum()
    # Rounding errors are of independent signs.
    size = float((torch.stack(sizes).sum() + (u.double() * along.double()).square().sum()).sqrt())
    if float((one - other).abs()) > 100 * torch.finfo(outputs.dtype).eps ** 0.75 * size:
        raise PruningError(
            "forward and backward derivatives of the network contradict each other, as those of "
            "an operation of one's own may"
        )


@contextmanager
def _plainly(network: MaskedNetwork) -> Iterator[None]:
    """Evaluation mode; attention in the plain form, the only one with all derivatives."""
    model = network.prunable.model
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        yield
