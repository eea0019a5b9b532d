"""Kept weights alone give the outputs and gradients of the masked dense network."""

import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

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
