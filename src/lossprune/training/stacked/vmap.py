"""Steps of stacked networks of any kind: ``torch.func.vmap`` over ``call_with``.

Running statistics of batch norm are updated in place, each member's in its own row: inside vmap
they are batched as the activations are, which is the one case in which torch allows that.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from lossprune.pruning.substitution import call_with
from lossprune.torch_state import in_mode
from lossprune.training.stacked.state import Stack


class AnySteps:
    """Logits and steps of a stack of networks built like ``network``."""

    what = "torch.func.vmap"

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def logits(self, stack: Stack, inputs: Tensor) -> Tensor:
        """Map ``inputs`` (1 or m, n, …) to logits (m, n, c), in evaluation mode."""
        with in_mode(self.network, training=False):
            return self._logits(stack.parameters, stack.buffers, inputs)

    def step(self, stack: Stack, inputs: Tensor, labels: Tensor, momentum: float) -> None:
        """Take a step on the mean cross-entropy of ``inputs`` and ``labels`` (1 or m, n)."""
        with torch.enable_grad(), in_mode(self.network, training=True):
            leaves = {name: it.detach().requires_grad_() for name, it in stack.parameters.items()}
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
