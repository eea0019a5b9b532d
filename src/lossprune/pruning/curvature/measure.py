"""Measuring a network on data: mean loss, its gradient and the diagonal of its GGN matrix."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lossprune.pruning.curvature.examples import device_of, take
from lossprune.pruning.curvature.layers import LayerCall, LayerCalls
from lossprune.pruning.curvature.losses import Loss, find_loss
from lossprune.pruning.curvature.squares import sum_of_squares
from lossprune.pruning.errors import PruningError
from lossprune.pruning.prunable import prunable_weights
from lossprune.pruning.randomness import PrivateRandomness


@dataclass(frozen=True)
class Statistics:
    """What was measured, over ``examples`` examples.

    Attributes:
        loss: mean loss.
        gradient: ∂L/∂θ by parameter name; empty if not asked for.
        ggn_diagonal: diag(G) by parameter name; empty if not asked for.
        examples: how many examples the means are over.
    """

    loss: float
    gradient: Mapping[str, Tensor]
    ggn_diagonal: Mapping[str, Tensor]
    examples: int


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    examples: int | None = None,
    *,
    mask: Mapping[str, Tensor] | None = None,
    loss: str | Loss = "cross_entropy",
    gradient: bool = True,
    ggn_diagonal: bool = True,
) -> Statistics:
    r"""Measure loss, gradient and GGN diagonal of a network's prunable weights, exactly.

    With the loss ℓ of one example, the Jacobian J of its outputs and the Hessian H of ℓ in the
    outputs, the generalised Gauss-Newton matrix is G = mean over examples of Jᵀ H J.  H = S Sᵀ for
    a factor S with a column for each rank of H, hence

        diag(G) = mean over examples of Σ_k (Jᵀ S_k)²,

    one backward pass a column, with gradients at the layers' outputs only.  Source: Schraudolph,
    "Fast curvature matrix-vector products", 2002; the column form as in Dangel et al., "BackPACK",
    2020.

    Args:
        model: left as it is, its gradients, hooks, mode and buffers included; measured in
            evaluation mode.  The first dimension of every layer's input must be the examples.
        batches: (inputs, targets) pairs; moved to the network's device as needed.
        examples: how many to read, exactly (the last batch is cut); None reads all.
        mask: weights to take as 0, by parameter name, True where kept.
        loss: a name in ``LOSSES`` or a :class:`Loss`.
        gradient: whether to measure the gradient.
        ggn_diagonal: whether to measure the GGN diagonal.

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
    loss = find_loss(loss)
    network = Network(model, mask)
    sums = _Sums(network, gradient, ggn_diagonal)
    with PrivateRandomness(), network.evaluating():
        for inputs, targets in take(batches, examples):
            if ggn_diagonal and sums.examples == 0:
                check_uses(network, inputs, targets, loss)
            _add_batch(sums, network, inputs, targets, loss)
    statistics = Statistics(
        sums.loss / sums.examples,
        {name: total / sums.examples for name, total in sums.gradient.items()},
        {name: total / sums.examples for name, total in sums.ggn_diagonal.items()},
        sums.examples,
    )
    _check_finite(statistics)
    return statistics


def mean_loss(
    model: nn.Module,
    batches: Iterable[Any],
    examples: int | None = None,
    *,
    mask: Mapping[str, Tensor] | None = None,
    loss: str | Loss = "cross_entropy",
) -> float:
    """Return the mean loss alone; arguments as :func:`measure`."""
    return measure(
        model, batches, examples, mask=mask, loss=loss, gradient=False, ggn_diagonal=False
    ).loss


class _Sums:
    """Running sums over the examples read so far."""

    def __init__(self, network: "Network", gradient: bool, ggn_diagonal: bool) -> None:
        self.examples = 0
        self.loss = 0.0
        self.gradient = network.zeros() if gradient else {}
        self.ggn_diagonal = network.zeros() if ggn_diagonal else {}


class Network:
    """A network at θ ⊙ m, evaluated without touching the module it was made from."""

    def __init__(self, model: nn.Module, mask: Mapping[str, Tensor] | None) -> None:
        self.model = model
        weights = prunable_weights(model)
        self.device = device_of(weights.values())
        self.weights: dict[str, Tensor] = {}
        for name, weight in weights.items():
            weight = weight.detach()
            if mask is not None:
                weight = weight * mask[name].to(weight.device)
            self.weights[name] = weight.requires_grad_()
        # Everything else enters as a constant; buffers as copies, in case the network writes them.
        self._constants = {name: p.detach() for name, p in model.named_parameters()}
        self._constants |= {name: b.clone() for name, b in model.named_buffers()}

    def __call__(self, inputs: Tensor) -> Tensor:
        """Outputs of the network at θ ⊙ m: (n, c)."""
        state = self._constants | self.weights
        outputs = functional_call(self.model, state, (inputs.to(self.device),))
        if not isinstance(outputs, Tensor):
            raise PruningError(
                f"the network must return a tensor of outputs, got {type(outputs).__name__}"
            )
        return outputs

    def zeros(self) -> dict[str, Tensor]:
        """One zero for every prunable weight, to sum in: float32, or wider as the weight is."""
        return {
            name: torch.zeros_like(
                weight, dtype=torch.promote_types(weight.dtype, torch.float32), requires_grad=False
            )
            for name, weight in self.weights.items()
        }

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode with gradients on, everything put back afterwards, also on an error."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.enable_grad():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def check_uses(network: Network, inputs: Tensor, targets: Tensor, loss: Loss) -> None:
    """Raise where the estimate would be wrong: weights used elsewhere, examples that interact.

    A few examples suffice, as both are properties of the graph.
    """
    few = inputs[:4]
    with LayerCalls(network.weights, detached=True) as recorder:
        outputs = network(few)
    loss.check(outputs.detach(), targets[:4])
    if outputs.requires_grad:
        elsewhere = torch.autograd.grad(
            outputs.sum(), list(network.weights.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(network.weights, elsewhere, strict=True):
            if gradient is not None:
                raise PruningError(
                    f"{name!r} is also used outside a linear or convolution function, where its "
                    "curvature cannot be measured; prune with MP or LM, or exclude it"
                )
    for call in recorder.calls:
        if call.output_shape[0] != len(few):
            raise PruningError(
                f"the layer of {call.name!r} gets inputs of first dimension "
                f"{call.inputs.shape[0]} for {len(few)} examples: it must be the examples"
            )
    if len(few) == 1 or not recorder.calls:
        return
    first = torch.autograd.grad(
        outputs[0].sum(), [call.output for call in recorder.calls], allow_unused=True
    )
    for call, gradient in zip(recorder.calls, first, strict=True):
        if gradient is not None and gradient[1:].count_nonzero():
            raise PruningError(
                f"the output of one example depends on others through {call.name!r}: the first "
                "dimension of its input is not the examples, or the network mixes them"
            )


def _add_batch(sums: _Sums, network: Network, inputs: Tensor, targets: Tensor, loss: Loss) -> None:
    sums.examples += len(targets)
    with (
        torch.set_grad_enabled(bool(sums.gradient or sums.ggn_diagonal)),
        LayerCalls(network.weights if sums.ggn_diagonal else {}) as recorder,
    ):
        outputs = network(inputs)
    targets = targets.to(outputs.device)
    logits = outputs.detach()
    loss.check(logits, targets)
    sums.loss += float(loss.value(logits.double(), targets).sum())
    if sums.gradient and outputs.requires_grad:
        found = torch.autograd.grad(
            outputs,
            list(network.weights.values()),
            loss.gradient(logits, targets),
            retain_graph=True,
            allow_unused=True,
        )
        for total, part in zip(sums.gradient.values(), found, strict=True):
            if part is not None:
                total += part
    if sums.ggn_diagonal and recorder.calls:
        factor = loss.hessian_factor(logits)
        for name, squares in _squared_gradients(outputs, recorder.calls, factor):
            sums.ggn_diagonal[name] += squares.view_as(sums.ggn_diagonal[name])


def _squared_gradients(
    outputs: Tensor, calls: list[LayerCall], factor: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield, by parameter name, Σ_n Σ_k (∂(z_n · S_nk)/∂θ)² as (g, o, i)."""
    edges = [call.output for call in calls]
    columns = [
        torch.autograd.grad(outputs, edges, column, retain_graph=True, allow_unused=True)
        for column in factor
    ]
    uses: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for call, gradients in zip(calls, zip(*columns, strict=True), strict=True):
        if gradients[0] is not None:  # the outputs do depend on this use
            at_output = torch.stack([call.geometry.outputs(part) for part in gradients])
            uses.setdefault(call.name, []).append((call.geometry.patches(call.inputs), at_output))
    for name, parts in uses.items():
        # Several uses of one weight are further positions of it: their gradients add up first.
        patches = torch.cat([patches for patches, _ in parts], dim=-1)
        gradients = torch.cat([gradients for _, gradients in parts], dim=-1)
        yield name, sum_of_squares(patches, gradients)


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
