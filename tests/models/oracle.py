"""What a network computes, by plain torch: masked outputs, and its statistics in double precision.

Nothing here is the library's: weights are set to zero by hand, and derivatives are those of
autograd, one example and one output at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import hessian
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lossprune.pruning import prunable_weights
from tests.models.architectures import ARCHITECTURES, Architecture

EXAMPLES = 6
LOSSES = {
    "cross_entropy": F.cross_entropy,
    "token_cross_entropy": lambda z, y: F.cross_entropy(z.flatten(0, -2), y.flatten()),
    "mse": F.mse_loss,
}


def fresh(architecture: Architecture, seed: int = 0) -> nn.Module:
    """Return a new network, the same for the same seed, whose batch norms have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = architecture.build()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_()
    return network


def inputs_of(architecture: Architecture, n: int = EXAMPLES, seed: int = 0) -> tuple[Any, ...]:
    return architecture.inputs(n, torch.Generator().manual_seed(seed))


def targets_of(architecture: Architecture, n: int = EXAMPLES) -> Tensor:
    return architecture.targets(n, torch.Generator().manual_seed(1))


def logits_of(architecture: Architecture, outputs: Any) -> Tensor:
    """Return the outputs that the loss is of."""
    if isinstance(outputs, Tensor):
        return outputs
    if architecture.logits is not None:
        return architecture.logits(outputs)
    if isinstance(outputs, tuple):  # as networks with auxiliary heads return in training mode
        return outputs[0]
    return outputs["logits"] if isinstance(outputs, dict) else outputs.logits


def zero_(network: nn.Module, mask: Mapping[str, Tensor]) -> nn.Module:
    """Set what the mask removes to zero, whatever wraps the network."""
    named = {plain(name): p for name, p in network.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name, kept in mask.items():
            if not isinstance(named[plain(name)], nn.parameter.UninitializedTensorMixin):
                named[plain(name)][~kept] = 0
    return network


def plain(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.")


def tensors_in(outputs: Any) -> list[Tensor]:
    """Return all tensors in what a network returned, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if is_dataclass(outputs):
        outputs = vars(outputs)
    if isinstance(outputs, Mapping):
        outputs = [outputs[key] for key in sorted(outputs)]
    if isinstance(outputs, (tuple, list)):
        return [tensor for part in outputs for tensor in tensors_in(part)]
    return []


@torch.no_grad()
def outputs_of(network: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return what the network gives in evaluation mode, without compiling."""
    with torch.compiler.set_stance("force_eager"):
        return tensors_in(network.eval()(*inputs))


@torch.no_grad()
def normalise_anew_(network: nn.Module, batches: list[tuple[Any, ...]]) -> nn.Module:
    """Give batch norms the mean statistics of batches, a batch's as torch has them after it."""
    norms = [m for m in network.eval().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    sums = [[torch.zeros_like(b, dtype=torch.float64) for b in norm.buffers()] for norm in norms]
    kept = [[b.clone() for b in norm.buffers()] for norm in norms]
    for inputs in batches:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        with torch.compiler.set_stance("force_eager"):
            network(*inputs)
        for norm, total in zip(norms, sums, strict=True):
            for part, b in zip(total, norm.buffers(), strict=True):
                part += b * len(tensors_in(list(inputs))[0]) / EXAMPLES
    for norm, total, (*old, seen) in zip(norms, sums, kept, strict=True):
        ran = bool(norm.num_batches_tracked)
        new = [*(total[:2] if ran else old), seen]
        for b, value in zip(norm.buffers(), new, strict=True):
            b.copy_(value)
    return network


@dataclass(frozen=True)
class Measured:
    """In double precision, by parameter name: loss, gradient, GGN diagonal, Hessian × gradient.

    The gradient that the Hessian is multiplied by is that of the prunable weights alone.
    """

    weights: dict[str, Tensor]
    loss: float
    gradient: dict[str, Tensor]
    ggn_diagonal: dict[str, Tensor]
    hessian_gradient: dict[str, Tensor]


@cache
def measured(name: str) -> Measured:
    architecture = ARCHITECTURES[name]
    network = fresh(architecture).double().eval().requires_grad_(True)
    inputs, targets = inputs_of(architecture), targets_of(architecture)
    targets = targets.double() if targets.is_floating_point() else targets
    loss = LOSSES[architecture.loss]
    prunable = prunable_weights(network, **architecture.chosen)
    named = dict(network.named_parameters())
    weights = list(named.values())
    diagonal = [torch.zeros_like(p) for p in weights]

    def derivatives(value: Tensor, **more: Any) -> list[Tensor]:
        found = torch.autograd.grad(value, weights, allow_unused=True, **more)
        return [
            torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)
        ]

    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        total = loss(logits_of(architecture, network(*_double(inputs))), targets)
        gradient = derivatives(total, create_graph=True)
        half = torch.stack(
            [
                (g * g.detach()).sum()
                for key, g in zip(named, gradient, strict=True)
                if key in prunable
            ]
        ).sum()
        product = derivatives(half, retain_graph=True) if half.requires_grad else gradient
        for example in range(EXAMPLES):
            z = logits_of(architecture, network(*_double(inputs, slice(example, example + 1))))
            y = targets[example : example + 1]
            curvature = hessian(lambda flat, z=z, y=y: loss(flat.view_as(z), y))(
                z.detach().flatten()
            )
            rows = [derivatives(part, retain_graph=True) for part in z.flatten()]
            for number, sums in enumerate(diagonal):
                jacobian = torch.stack([row[number].flatten() for row in rows])
                part = torch.einsum("ci,cd,di->i", jacobian, curvature, jacobian)
                sums += part.view_as(sums) / EXAMPLES
    return Measured(
        {key: p.detach() for key, p in named.items()},
        float(total),
        dict(zip(named, [g.detach() for g in gradient], strict=True)),
        dict(zip(named, diagonal, strict=True)),
        dict(zip(named, product, strict=True)),
    )


def _double(value: Any, examples: slice = slice(None)) -> Any:
    """Return these examples of the inputs in double precision."""
    if isinstance(value, Tensor):
        return (value.double() if value.is_floating_point() else value)[examples]
    if isinstance(value, dict):
        return {key: _double(part, examples) for key, part in value.items()}
    return tuple(_double(part, examples) for part in value)
