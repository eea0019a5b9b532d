"""Kept weights alone give the outputs and gradients of the masked dense network."""

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lossprune
from lossprune.kernels.compiler import compiler_available
from tests.training.convolution.oracle import compared, drawn, random_mask, whole

pytestmark = pytest.mark.skipif(not compiler_available(), reason="no C compiler here")

EXAMPLES = 600 if "LOSSPRUNE_FULL" in os.environ else 30
IMAGES = st.sampled_from([1, 2, 3, 4, 5, 8, 15, 16, 17, 40])  # of blocks of 4, 8 or 16
LEFT = st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.1])


@st.composite
def convolutions(draw, inputs: int) -> tuple[nn.Conv2d, tuple[int, ...]]:
    """A layer of some inputs, and the size of the least map that it takes."""
    groups = draw(st.sampled_from([g for g in range(1, inputs + 1) if inputs % g == 0]))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    settings = {
        "kernel_size": draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        "stride": draw(pair),
        "padding": tuple(n - 1 for n in draw(pair)),
        "dilation": draw(pair),
    }
    spans = zip(settings["kernel_size"], settings["dilation"], settings["padding"], strict=True)
    least = tuple(max(1, (k - 1) * d + 1 - 2 * p) for k, d, p in spans)
    outputs = groups * draw(st.integers(1, 4))
    return nn.Conv2d(inputs, outputs, groups=groups, bias=draw(st.booleans()), **settings), least


@st.composite
def convolutional(draw) -> tuple[nn.Sequential, tuple[int, ...], bool]:
    """A network of one to three convolutions, its inputs' shape, and whether it has rectifiers."""
    channels = draw(st.integers(1, 6))
    rectified = draw(st.booleans())
    first, size = draw(convolutions(channels))
    size = tuple(n + draw(st.integers(0, 9)) for n in size)
    shape = (draw(IMAGES), channels, *size)
    layers: list[nn.Module] = [first]
    for _ in range(draw(st.integers(0, 2))):
        channels, *size = nn.Sequential(*layers)(torch.zeros(1, *shape[1:])).shape[1:]
        layer, least = draw(convolutions(channels))
        if any(n < m for n, m in zip(size, least, strict=True)):
            break
        layers += [nn.ReLU() if rectified else nn.Tanh(), layer]
    if draw(st.booleans()):
        features = nn.Sequential(*layers, nn.Flatten())(torch.zeros(1, *shape[1:])).shape[1]
        layers += [nn.Flatten(), nn.Linear(features, 4, bias=draw(st.booleans()))]
    return nn.Sequential(*layers), shape, rectified


@given(convolutional(), LEFT, st.integers(0, 1000))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
def test_convolutions(case, left, seed):
    network, shape, rectified = case
    numbers = whole if rectified else drawn
    for parameter in network.parameters():
        parameter.data = numbers(*parameter.shape, seed=seed)
    inputs = numbers(*shape, seed=seed + 1)
    model = compared(network, random_mask(network, left, seed), inputs, numbers=numbers)
    assert model.notes == []


@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.booleans(), IMAGES, LEFT)
@settings(max_examples=EXAMPLES // 4, deadline=None, derandomize=True, database=None)
def test_features(sizes, bias, images, left):
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    network = nn.Sequential(*layers)
    for parameter in network.parameters():
        parameter.data = whole(*parameter.shape)
    compared(network, random_mask(network, left), whole(images, sizes[0]), numbers=whole)


# Several chunks of channels, outputs that pass the caches by, and memory that is used again.
LARGE = {
    "many channels": (nn.Conv2d(96, 40, 3, padding=1), (20, 96, 9, 7), 0.03),
    "many features": (nn.Linear(700, 60), (20, 700), 0.05),
    "all of many channels": (nn.Conv2d(80, 6, (1, 3), stride=2), (17, 80, 5, 9), 1.1),
    "large maps": (nn.Conv2d(3, 40, 3, padding=1, groups=1), (17, 3, 32, 33), 0.2),
    "large maps, by twos": (nn.Conv2d(4, 80, 3, 2, 1, groups=4), (33, 4, 43, 41), 0.3),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_layers(name):
    layer, shape, left = LARGE[name]
    for parameter in layer.parameters():
        parameter.data = whole(*parameter.shape)
    network = nn.Sequential(layer, nn.ReLU())
    model = compared(network, random_mask(network, left), whole(*shape), numbers=whole)
    assert model.notes == []


def test_two_batches_at_once():
    """Forwards twice before backwards twice, and what came out stays what it was."""
    layers = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3)
    network = nn.Sequential(*layers)
    batches = [drawn(17, 3, 32, 32, seed=seed) for seed in (1, 2)]
    model = lossprune.sparse(network, random_mask(network, 0.2), batches[0])

    def gradients(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.sum(), list(model.parameters())))

    alone = [(model(x).clone(), gradients(model(x))) for x in batches]
    outputs = [model(x) for x in batches]
    together = [(out, gradients(out)) for out in outputs]
    for (out, found), (expected, right) in zip(together, alone, strict=True):
        assert torch.equal(out, expected)
        assert all(map(torch.equal, found, right))
