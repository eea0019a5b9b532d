"""What a stack of networks computes: logits and steps, for perceptrons and for any networks.

Index letters: m member, n example, i input, o output, c class.  With shared examples the inputs
have a first axis of 1, which is expanded, not copied.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from lossprune.kernels.interface import Activation
from lossprune.pruning.substitution import call_with
from lossprune.torch_state import in_mode
from lossprune.training.perceptron.structure import PerceptronLayer
from lossprune.training.stacked.state import Stack


class PerceptronSteps:
    """Those of perceptrons with these layers, written out: batched products into kept memory."""

    def __init__(self, layers: Sequence[PerceptronLayer]) -> None:
        self.layers = layers
        self._room: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def what(self) -> str:
        """What is computed at once, in one clause."""
        return f"batched products of {len(self.layers)} linear layers"

    def logits(self, stack: Stack, inputs: Tensor) -> Tensor:
        """Return the logits (m, n, c) of ``inputs`` (1 or m, n, …)."""
        return self._forward(stack, inputs.flatten(2), [None] * len(self.layers))[-1]

    @torch.no_grad()
    def step(self, stack: Stack, inputs: Tensor, labels: Tensor, momentum: float) -> None:
        """Take a step on the mean cross-entropy of ``inputs`` and ``labels`` (1 or m, n).

        The velocity takes the gradient within the product, v ← momentum · v + δᵀ a, so that no
        gradient of a weight is ever stored.
        """
        examples = labels.shape[1]
        outputs, deltas = self._memory(stack, examples)
        activations = self._forward(stack, inputs.flatten(2), outputs)
        delta = _loss_(stack, activations.pop(), labels)
        for number in reversed(range(len(self.layers))):
            name, linear = self.layers[number].name, self.layers[number].linear
            active = activations[number]
            below = None
            if number:  # before the weight takes its step
                below = torch.bmm(delta, stack.parameters[f"{name}.weight"], out=deltas[number - 1])
            stack.velocities[f"{name}.weight"].baddbmm_(delta.mT, active, beta=momentum)
            stack.step_(f"{name}.weight")
            if linear.bias is not None:
                stack.velocities[f"{name}.bias"].mul_(momentum).add_(delta.sum(1))
                stack.step_(f"{name}.bias")
            if below is not None:
                delta = _backward_(below, active, self.layers[number - 1].activation)

    def _forward(
        self, stack: Stack, inputs: Tensor, outputs: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Return the inputs of each layer, and the logits."""
        active = inputs.expand(len(stack), -1, -1)
        activations = [active]
        for layer, out in zip(self.layers, outputs, strict=True):
            weight = stack.parameters[f"{layer.name}.weight"]
            if layer.linear.bias is None:
                active = torch.bmm(active, weight.mT, out=out)
            else:
                bias = stack.parameters[f"{layer.name}.bias"].unsqueeze(1)
                active = torch.baddbmm(bias, active, weight.mT, out=out)
            if layer.activation == Activation.TANH:
                active.tanh_()
            elif layer.activation == Activation.RELU:
                active.relu_()
            activations.append(active)
        return activations

    def _memory(self, stack: Stack, examples: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return outputs of all layers and their gradients, of hidden layers: (m, n, o) each.

        It is the same memory from step to step, the first rows of it for a smaller batch.
        """
        members, room = len(stack), (0, 0) if self._room is None else self._room[0][0].shape[:2]
        if self._room is None or room[0] != members or room[1] < examples:
            self._room = None  # first, so that there are never two
            shapes = [(members, examples, layer.linear.out_features) for layer in self.layers]
            kind = {"dtype": stack.dtype, "device": stack.device}
            self._room = (
                [torch.empty(shape, **kind) for shape in shapes],
                [torch.empty(shape, **kind) for shape in shapes[:-1]],
            )
        outputs, deltas = ([room[:, :examples] for room in tensors] for tensors in self._room)
        return outputs, deltas


def _loss_(stack: Stack, logits: Tensor, labels: Tensor) -> Tensor:
    """Add the losses to the stack's totals and return ∂(mean loss)/∂logits (m, n, c)."""
    labels = labels.expand(len(stack), -1).unsqueeze(2)
    log_p = torch.log_softmax(logits, 2)
    stack.totals.sub_(log_p.gather(2, labels).sum((1, 2)))
    classes = torch.arange(logits.shape[2], device=logits.device)
    # A comparison, for scattering is not deterministic on every device.
    return log_p.exp_().sub_((labels == classes).to(logits.dtype)).div_(labels.shape[1])


def _backward_(gradient: Tensor, active: Tensor, activation: Activation) -> Tensor:
    """Return the gradient before an activation, in place; ``active`` is used up."""
    if activation == Activation.TANH:
        return gradient.addcmul_(gradient, active.mul_(active), value=-1)  # g − g a²
    if activation == Activation.RELU:
        return gradient.mul_(active > 0)
    return gradient


class AnySteps:
    """Those of networks built like ``network``: :func:`torch.func.vmap` over ``call_with``.

    Running statistics of batch norm are updated in place, each member's in its own row: inside vmap
    they are batched as the activations are, which is the one case in which torch allows that.
    """

    what = "torch.func.vmap"

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def logits(self, stack: Stack, inputs: Tensor) -> Tensor:
        """Return the logits (m, n, c) of ``inputs`` (1 or m, n, …), in evaluation mode."""
        with in_mode(self.network, training=False):
            return self._logits(stack.parameters, stack.buffers, inputs)

    def step(self, stack: Stack, inputs: Tensor, labels: Tensor, momentum: float) -> None:
        """Take a step on the mean cross-entropy of ``inputs`` and ``labels`` (1 or m, n)."""
        with torch.enable_grad(), in_mode(self.network, training=True):
            leaves = {
                name: parameter.detach().requires_grad_()
                for name, parameter in stack.parameters.items()
            }
            logits = self._logits(leaves, stack.buffers, inputs)
            members, examples = logits.shape[:2]
            losses = F.cross_entropy(
                logits.flatten(0, 1), labels.expand(members, -1).flatten(), reduction="none"
            ).view(members, examples)
            # The gradient of the sum over members holds that of each member's mean in its row.
            gradients = torch.autograd.grad(losses.mean(1).sum(), list(leaves.values()))
        with torch.no_grad():
            stack.totals.add_(losses.sum(1))
            for name, gradient in zip(leaves, gradients, strict=True):
                stack.velocities[name].mul_(momentum).add_(gradient)
                stack.step_(name)

    def _logits(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Tensor
    ) -> Tensor:
        shared = len(inputs) == 1
        each = vmap(self._one, in_dims=(0, 0, None if shared else 0))
        return each(parameters, buffers, inputs[0] if shared else inputs)

    def _one(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], inputs: Tensor
    ) -> Tensor:
        return call_with({**parameters, **buffers}, self.network, inputs)


Steps = PerceptronSteps | AnySteps
