"""Networks that inference engines are compared on: by name, with the shape of one example."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lossprune.networks import NETWORKS


@dataclass(frozen=True)
class Subject:
    """How to build a network, and the shape of one example."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


class MobileNet(nn.Sequential):
    """Depthwise and pointwise convolutions in turn, as MobileNetV1 has them, for 32×32 images."""

    def __init__(self, classes: int = 10) -> None:
        widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
        modules: list[nn.Module] = [*_normed(3, 32, 3)]
        before = 32
        for width, stride in [*widths, (1024, 2), (1024, 1)]:
            modules += _normed(before, before, 3, stride=stride, groups=before)
            modules += _normed(before, width, 1)
            before = width
        super().__init__(
            *modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)
        )


def _normed(
    inputs: int,
    outputs: int,
    size: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] = nn.ReLU,
) -> list[nn.Module]:
    convolution = nn.Conv2d(
        inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=False
    )
    end = [] if activation is nn.Identity else [activation(inplace=True)]
    return [convolution, nn.BatchNorm2d(outputs), *end]


class Excitation(nn.Module):
    """A scale for each channel, of the channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.less, self.more = (
            nn.Conv2d(channels, channels // 4, 1),
            nn.Conv2d(channels // 4, channels, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        means = nn.functional.adaptive_avg_pool2d(images, 1)
        return images * nn.functional.hardsigmoid(self.more(nn.functional.relu(self.less(means))))


class Inverted(nn.Module):
    """A depthwise convolution between two pointwise ones, beside its input."""

    def __init__(
        self, inputs: int, wide: int, outputs: int, size: int, stride: int, excited: bool,
        activation: type[nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        self.block = nn.Sequential(
            *_normed(inputs, wide, 1, activation=activation),
            *_normed(wide, wide, size, stride, wide, activation),
            *([Excitation(wide)] if excited else []),
            *_normed(wide, outputs, 1, activation=nn.Identity),
        )
        self.beside = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        made = self.block(images)
        return images + made if self.beside else made


class MobileNetV3(nn.Sequential):
    """The blocks of MobileNetV3-Large, two of whose strides are 1, for 32×32 images."""

    def __init__(self, classes: int = 10) -> None:
        rows = [  # wide, outputs, size, stride, excited
            (16, 16, 3, 1, False), (64, 24, 3, 1, False), (72, 24, 3, 1, False),
            (72, 40, 5, 2, True), (120, 40, 5, 1, True), (120, 40, 5, 1, True),
            (240, 80, 3, 2, False), (200, 80, 3, 1, False), (184, 80, 3, 1, False),
            (184, 80, 3, 1, False), (480, 112, 3, 1, True), (672, 112, 3, 1, True),
            (672, 160, 5, 2, True), (960, 160, 5, 1, True), (960, 160, 5, 1, True),
        ]  # fmt: skip
        modules = _normed(3, 16, 3, activation=nn.Hardswish)
        before = 16
        for k, (wide, outputs, *form) in enumerate(rows):
            activation = nn.ReLU if k < 6 else nn.Hardswish
            modules.append(Inverted(before, wide, outputs, *form, activation))
            before = outputs
        modules += [*_normed(before, 960, 1, activation=nn.Hardswish), nn.AdaptiveAvgPool2d(1)]
        head = [nn.Linear(960, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, classes)]
        super().__init__(*modules, nn.Flatten(), *head)


class Encoder(nn.Module):
    """A transformer's encoder: layers on embedded tokens, (n, tokens, width)."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and beside its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.before(tokens)
        shape = (*tokens.shape[:2], self.heads, -1)
        query, key, value = (
            layer(normed).view(shape).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = (query @ key.transpose(2, 3)) / query.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        tokens = tokens + self.out(mixed)
        return tokens + self.narrow(nn.functional.gelu(self.wide(self.between(tokens))))


class VisionTransformer(nn.Module):
    """Patches of 4×4 pixels of 32×32 images as tokens, an encoder, and the mean as its answer."""

    def __init__(self, layers: int = 6, width: int = 192, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.encoder = Encoder(layers, width, heads)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.encoder(tokens)).mean(1))


SUBJECTS = {
    "MLP": Subject(partial(NETWORKS["MLP"], shape=(1, 28, 28)), (1, 28, 28)),
    "VGG11": Subject(partial(NETWORKS["VGG11"], shape=(3, 32, 32)), (3, 32, 32)),
    "PreActResNet18": Subject(partial(NETWORKS["PreActResNet18"], shape=(3, 32, 32)), (3, 32, 32)),
    "MobileNet": Subject(MobileNet, (3, 32, 32)),
    "MobileNetV3": Subject(MobileNetV3, (3, 32, 32)),
    "encoder": Subject(partial(Encoder, 6, 384, 6), (128, 384)),
    "ViT": Subject(VisionTransformer, (3, 32, 32)),
}


def built(name: str) -> nn.Module:
    """Return the network of this name in evaluation mode, the same one every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SUBJECTS[name].build().eval()
