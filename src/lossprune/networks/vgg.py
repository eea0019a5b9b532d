"""VGG (Simonyan and Zisserman, 2014) for small images, with and without batch normalisation.

Configurations A (11 layers) and E (19 layers) of the paper: 3×3 convolutions with padding 1, a
2×2 maximum after each group, and a classifier of three linear layers, 512 wide.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from lossprune.networks.building import checked_shape

# The widths of the convolutions; a maximum over 2×2 ends each group.
GROUPS = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}
REDUCTION = 2 ** len(GROUPS[11])


def vgg(
    *,
    depth: int,
    shape: Sequence[int] = (3, 32, 32),
    classes: int = 10,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Return ``features`` → ``flatten`` → ``classifier``; layers are numbered in order in each.

    Without batch norm every layer has biases. With it the convolutions and hidden linear layers
    have none, and a batch norm follows each layer, the outputs included, as published.

    The classifier takes 512 · ⌊height / 32⌋ · ⌊width / 32⌋ inputs.

    Raises:
        ValueError: the images are smaller than 32×32, which leaves nothing after five poolings.
    """
    name = f"VGG{depth}{'BN' if batch_norm else ''}"
    channels, height, width = checked_shape(name, shape, classes)
    if min(height, width) < REDUCTION:
        raise ValueError(
            f"{name}: shape must be at least {REDUCTION}×{REDUCTION} pixels, "
            f"for its five poolings halve the image each, got {height}×{width}"
        )
    positions = (height // REDUCTION) * (width // REDUCTION)
    return nn.Sequential(
        OrderedDict(
            features=_features(channels, GROUPS[depth], batch_norm),
            flatten=nn.Flatten(),
            classifier=_classifier(512 * positions, classes, batch_norm),
        )
    )


def _features(channels: int, groups: Sequence[Sequence[int]], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for group in groups:
        for width in group:
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _classifier(inputs: int, classes: int, batch_norm: bool) -> nn.Sequential:
    if not batch_norm:
        return nn.Sequential(
            nn.Linear(inputs, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, classes),
        )
    return nn.Sequential(
        nn.Linear(inputs, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, classes),
        nn.BatchNorm1d(classes),
    )
