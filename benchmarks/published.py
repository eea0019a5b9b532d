"""The published algorithm for the exact GGN diagonal, written plainly: the baseline to beat.

Per class, one backward pass of the class's log-probability weighted by √p, with weight gradients;
per layer, unfold, per-example weight gradients by a batched product, square, mean.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gradient_and_ggn_diagonal(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ∂L/∂θ and diag(G) of the Linear and Conv2d weights of ``model``, by name."""
    layers = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    hooks = []
    for name, layer in layers.items():

        def forward_hook(layer, args, output, name=name):
            inputs[name] = args[0].detach()

        def backward_hook(layer, grad_input, grad_output, name=name):
            gradients[name] = grad_output[0].detach()

        hooks += [
            layer.register_forward_hook(forward_hook),
            layer.register_full_backward_hook(backward_hook),
        ]
    total = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    mean = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    examples = 0
    model.eval()
    for images, targets in batches:
        examples += len(targets)
        outputs = model(images)
        model.zero_grad()
        F.cross_entropy(outputs, targets, reduction="sum").backward(retain_graph=True)
        for name, layer in layers.items():
            mean[name] += layer.weight.grad
        log_p = F.log_softmax(outputs, dim=1)
        for column in range(outputs.shape[1]):
            model.zero_grad()
            weight = log_p[:, column].detach().exp().sqrt()
            (log_p[:, column] * weight).sum().backward(retain_graph=True)
            for name, layer in layers.items():
                total[name] += _squares(layer, inputs[name], gradients[name])
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return (
        {name: value / examples for name, value in mean.items()},
        {name: value / examples for name, value in total.items()},
    )


def _squares(layer: nn.Module, inputs: Tensor, gradients: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(
            inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        ).transpose(1, 2)
        per_example = torch.bmm(gradients.flatten(2), patches)
    else:
        per_example = torch.bmm(gradients[:, :, None], inputs[:, None])
    return per_example.square().sum(0).view_as(layer.weight)
