"""Convolutional networks drawn at random, with residual blocks, and masks that cut channels off."""

import torch
from hypothesis import strategies as st
from torch import nn

from lossprune import Mask


class Block(nn.Module):
    """x + F(x), or shortcut(x) + F(x), with what comes before and after drawn."""

    def __init__(self, inputs, width, outputs, norm, activation, size):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs) if norm else nn.Identity()
        self.activation = activation
        self.one = nn.Conv2d(inputs, width, size, padding=size // 2, bias=not norm)
        self.two = nn.Conv2d(width, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        active = self.activation(self.norm(x))
        way = x if self.shortcut is None else self.shortcut(active)
        return way + self.two(self.activation(self.one(active)))


@st.composite
def networks(draw):
    channels, layers = 3, [nn.Conv2d(2, 3, 3, padding=1)]
    smooth = st.sampled_from([nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.LeakyReLU(0.2)])
    for _ in range(draw(st.integers(1, 4))):
        width = draw(st.integers(1, 6))
        kind = draw(st.sampled_from(["conv", "block", "pool", "norm", "activation"]))
        if kind == "conv":
            size, padding = draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))
            options = {"padding": padding, "bias": draw(st.booleans())}
            layers.append(nn.Conv2d(channels, width, size, **options))
            channels = width
        elif kind == "block":
            norm, size = draw(st.booleans()), draw(st.sampled_from([1, 3]))
            outputs = draw(st.sampled_from([channels, width]))
            layers.append(Block(channels, width, outputs, norm, draw(smooth), size))
            channels = outputs
        elif kind == "pool":
            pools = [nn.MaxPool2d(2, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2, 1)]
            layers.append(draw(st.sampled_from(pools)))
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(channels))
        layers.append(draw(smooth))
    layers.append(nn.Conv2d(channels, 4, 3, padding=1))
    positions = draw(st.sampled_from([1, 2]))
    layers += [nn.AdaptiveAvgPool2d(positions), nn.Flatten(), draw(smooth)]
    if draw(st.booleans()):
        layers.append(nn.BatchNorm1d(4 * positions**2))
    layers += [nn.Linear(4 * positions**2, 5), draw(smooth), nn.Linear(5, 3)]
    return nn.Sequential(*layers)


def randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return the model in double precision, with random parameters and statistics."""
    model = model.double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn(tensor.shape, generator=generator).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_var.abs_().add_(0.1)
    return model


@st.composite
def masks(draw, model: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Which weights are kept, at a sparsity drawn for each layer."""
    return {
        name: torch.rand(kept.shape, generator=generator)
        >= draw(st.sampled_from([0.3, 0.8, 0.95, 1.0]))
        for name, kept in Mask.dense(model).items()
    }
