"""Small networks of the blocks that image classifiers are made of."""

import torch
import torch.nn.functional as F
from torch import nn


def normed(inputs, outputs, size, activation=None, stride=1, groups=1):
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(convolution, norm, *([activation] if activation else []))


class Excitation(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels, activation, scale):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.activation, self.scale = activation, scale

    def forward(self, x):
        return self.scale(self.fc2(self.activation(self.fc1(self.pool(x))))) * x


class StochasticDepth(nn.Module):
    """Leaves out whole blocks in training."""

    def forward(self, x):
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.8)) if self.training else x


class Inverted(nn.Module):
    """An inverted residual block."""

    def __init__(self, inputs, outputs, size, stride, activation, excitation=None):
        super().__init__()
        wide = 2 * inputs
        parts = [
            normed(inputs, wide, 1, activation),
            normed(wide, wide, size, activation, stride, groups=wide),
            *([excitation(wide)] if excitation else []),
            normed(wide, outputs, 1),
        ]
        self.block, self.depth = nn.Sequential(*parts), StochasticDepth()
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.block(x)
        return x + self.depth(y) if self.residual else y


def inverted(activation, excitation=None):
    return nn.Sequential(
        normed(3, 8, 3, activation(), 2),
        Inverted(8, 8, 3, 1, activation(), excitation),
        Inverted(8, 12, 5, 2, activation(), excitation),
        normed(12, 24, 1, activation()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(24, 5),
    )  # fmt: skip


class DenseNet(nn.Module):
    """Layers that read all before them, and a transition."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(normed(3, 8, 3, nn.ReLU(), 2), nn.MaxPool2d(3, 2, 1))
        self.layers = nn.ModuleList(
            nn.Sequential(
                normed(8 + 4 * k, 8, 1, nn.ReLU(inplace=True)), nn.Conv2d(8, 4, 3, padding=1)
            )
            for k in range(3)
        )
        self.norm, self.shrink = nn.BatchNorm2d(20), nn.Conv2d(20, 10, 1, bias=False)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        made = [self.stem(x)]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        x = F.avg_pool2d(self.shrink(F.relu(self.norm(torch.cat(made, 1)), inplace=True)), 2, 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(F.relu(x), (1, 1)), 1))


class Inception(nn.Module):
    """Branches side by side, as in Inception and SqueezeNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.one, self.three = normed(8, 4, 1, nn.ReLU()), normed(8, 6, 3, nn.ReLU())
        self.wide, self.high = (
            nn.Conv2d(8, 4, (1, 7), padding=(0, 3)),
            nn.Conv2d(4, 4, (5, 1), 1, (2, 0)),
        )
        self.pooled = normed(8, 4, 1, nn.ReLU())
        self.last = nn.Conv2d(18, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        x = torch.cat([self.one(x), self.three(x), F.relu(self.high(self.wide(x))), pooled], 1)
        return self.last(F.dropout(x, 0.5, self.training)).relu().mean([2, 3])


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, and a perceptron of the channels at each position."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wide = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels))
        with torch.no_grad():
            self.norm.weight.normal_(), self.norm.bias.normal_()

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(F.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Blocks, and norms of channels before strides."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 6, 4, 4), ConvNeXtBlock(6)
        self.norm, self.down = nn.LayerNorm(6), nn.Conv2d(6, 10, 2, 2)
        self.second, self.last = ConvNeXtBlock(10), nn.LayerNorm(10)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        x = self.first(self.stem(x))
        x = torch.permute(F.layer_norm(x.permute(0, 2, 3, 1), (6,), self.norm.weight), (0, 3, 1, 2))
        return self.head(self.last(self.second(self.down(x)).mean([-2, -1])))


NETWORKS = {
    "MobileNetV2": lambda: inverted(nn.ReLU6),
    "MobileNetV3": lambda: inverted(
        nn.Hardswish, lambda wide: Excitation(wide, nn.ReLU(), nn.Hardsigmoid())
    ),
    "EfficientNet": lambda: inverted(
        nn.SiLU, lambda wide: Excitation(wide, nn.SiLU(), nn.Sigmoid())
    ),
    "DenseNet": DenseNet,
    "Inception": Inception,
    "ConvNeXt": ConvNeXt,
}
