"""Steps of stacked multilayer perceptrons, written out: batched products into memory kept for them.

Index letters: m member, n example, i input, o output, c class.  With shared examples the inputs
have a first axis of 1, which is expanded, not copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lossprune.kernels.interface import Activation
from lossprune.training.perceptron.structure import Stage
from lossprune.training.stacked.state import Stack


class PerceptronSteps:
    """Logits and steps of a stack of networks with these layers."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self._room: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def what(self) -> str:
        """What is computed at once, in one clause."""
        return f"batched products of {len(self.stages)} linear layers"

    def logits(self, stack: Stack, inputs: Tensor) -> Tensor:
        """Map ``inputs`` (1 or m, n, …) to logits (m, n, c)."""
        return self._forward(stack, inputs.flatten(2), [None] * len(self.stages))[-1]

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
        for number in reversed(range(len(self.stages))):
            name, linear = self.stages[number].name, self.stages[number].linear
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
                delta = _backward_(below, active, self.stages[number - 1].activation)

    def _forward(
        self, stack: Stack, inputs: Tensor, outputs: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Return the inputs of each layer, and the logits."""
        active = inputs.expand(len(stack), -1, -1)
        activations = [active]
        for stage, out in zip(self.stages, outputs, strict=True):
            weight = stack.parameters[f"{stage.name}.weight"]
            if stage.linear.bias is None:
                active = torch.bmm(active, weight.mT, out=out)
            else:
                bias = stack.parameters[f"{stage.name}.bias"].unsqueeze(1)
                active = torch.baddbmm(bias, active, weight.mT, out=out)
            if stage.activation == Activation.TANH:
                active.tanh_()
            elif stage.activation == Activation.RELU:
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
            shapes = [(members, examples, stage.linear.out_features) for stage in self.stages]
            kind = {"dtype": stack.dtype, "device": stack.device}
            self._room = (
                [torch.empty(shape, **kind) for shape in shapes],
                [torch.empty(shape, **kind) for shape in shapes[:-1]],
            )
        outputs, deltas = ([it[:, :examples] for it in tensors] for tensors in self._room)
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
