"""Chunks, columns a few at a time, and every way of squaring give the same statistics."""

import gc

import pytest
import torch
from torch import nn

import lossprune

CLASSES = 4


def many_positions() -> nn.Module:
    """Layers of one, few and very many positions, one of them grouped."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, stride=4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(54, CLASSES),
    )


def tokens() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 40),
        nn.ReLU(inplace=True),
        nn.Linear(40, 3),
        nn.Flatten(),
        nn.Linear(9, CLASSES),
    )


NETWORKS = {"convolutions": (many_positions, (2, 12, 12)), "tokens": (tokens, (3, 5))}


def data(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(11, *shape, dtype=torch.float64, generator=generator)
    return inputs.to(dtype), torch.arange(11) % CLASSES


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("memory", [1, 50_000, 1 << 20, None])
@pytest.mark.parametrize("size", [1, 4, 11])
def test_the_same_within_any_memory(name, dtype, tolerance, memory, size, agrees):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().to(dtype)
    inputs, targets = data(shape, dtype)
    batches = list(zip(inputs.split(size), targets.split(size), strict=True))

    statistics = lossprune.measure(model, batches, memory=memory)

    agrees(statistics, model, inputs, targets, tolerance=tolerance)
    assert all((h >= 0).all() for h in statistics.ggn_diagonal.values())


@pytest.mark.parametrize("memory", [0, -1, 1.5, True, "1 GB"])
def test_memory_must_be_a_whole_number_of_bytes(memory):
    inputs, targets = data((5,), torch.float32)
    with pytest.raises(ValueError, match="memory must be a whole number of bytes, at least 1, got"):
        lossprune.measure(nn.Linear(5, CLASSES), [(inputs, targets)], memory=memory)


def test_wide_layers_in_single_precision(agrees):
    """A weight larger than a cache, few and many positions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 300, 5, padding=2), nn.Tanh(), nn.Conv1d(300, 200, 3, stride=9), nn.Flatten(),
        nn.Linear(400, 3),
    )  # fmt: skip
    inputs = torch.randn(2, 3, 20)
    targets = torch.tensor([0, 2])

    statistics = lossprune.measure(model, [(inputs, targets)])

    agrees(statistics, model, inputs, targets, tolerance=1e-4)


@pytest.mark.parametrize("curvature", [False, True])
def test_nothing_is_left_behind(curvature):
    """Not even for the garbage collector: a pruning of many stages would fill the memory first."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Sigmoid())
    batches = [(torch.randn(6, 4), torch.arange(6) % 3)]
    lossprune.measure(model, batches, ggn_diagonal=curvature)
    gc.collect()
    gc.disable()
    try:
        before = tensors_alive()
        for _ in range(3):
            lossprune.measure(model, batches, ggn_diagonal=curvature)
        assert tensors_alive() == before
    finally:
        gc.enable()


def tensors_alive():
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
