"""The curvature of what a mask keeps, also where it empties rows, columns and whole layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lossprune

CLASSES = 3


class Shared(nn.Module):
    """One weight used at two places."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.a(torch.tanh(self.a(x)))))


NETWORKS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(),
                              nn.Linear(8, CLASSES)),
        (9,),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4), nn.Flatten(),
                              nn.Linear(12, CLASSES)),
        (3, 5),
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(),
                              nn.Conv2d(8, 8, 3, stride=2), nn.Tanh(), nn.Flatten(),
                              nn.Linear(72, CLASSES)),
        (2, 8, 8),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.Tanh(), nn.Flatten(),
                              nn.Linear(32, CLASSES)),
        (4, 6),
    ),
    "shared": (Shared, (6,)),
}  # fmt: skip


def make_mask(model: nn.Module, seed: int, rows: float, columns: float, entries: float):
    """Keep shares of the outputs, of the inputs of each, and of what they have in common."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, ones in lossprune.Mask.dense(model).items():
        flat = torch.rand(ones.flatten(1).shape, generator=generator) < entries
        flat &= torch.rand(len(flat), 1, generator=generator) < rows
        flat &= torch.rand(1, flat.shape[1], generator=generator) < columns
        kept[name] = flat.view(ones.shape)
    return lossprune.Mask(kept)


SHARES = st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 99), rows=SHARES, columns=SHARES, entries=SHARES, single=st.booleans())
def test_any_mask(name, seed, rows, columns, entries, single, agrees):
    build, shape = NETWORKS[name]
    torch.manual_seed(seed)
    dtype = torch.float32 if single else torch.float64
    model = build().to(dtype)
    inputs = torch.randn(4, *shape, dtype=dtype)
    targets = torch.arange(4) % CLASSES
    mask = make_mask(model, seed, rows, columns, entries)

    statistics = lossprune.measure(model, [(inputs, targets)], mask=mask)

    agrees(statistics, model, inputs, targets, mask=mask, tolerance=1e-4 if single else 1e-10)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layer", [0, -1])
def test_a_layer_without_weights(name, layer, agrees):
    """The network still answers, by the biases after it; the others' statistics are exact."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double()
    kept = dict(lossprune.Mask.dense(model))
    emptied = list(kept)[layer]
    kept[emptied] = torch.zeros_like(kept[emptied])
    inputs = torch.randn(4, *shape, dtype=torch.float64)
    targets = torch.arange(4) % CLASSES

    statistics = lossprune.measure(model, [(inputs, targets)], mask=kept)

    agrees(statistics, model, inputs, targets, mask=kept)


@pytest.mark.parametrize("criterion", ["LM", "QM", "OBD"])
def test_pruning_until_one_weight_is_left(criterion):
    torch.manual_seed(0)
    build, shape = NETWORKS["linear"]
    batch = (torch.randn(6, *shape), torch.arange(6) % CLASSES)
    mask = lossprune.prune(
        build(), criterion, sparsity=227 / 228, data=[batch], stages=12
    ).mask  # fmt: skip
    assert mask.total - mask.removed == 1
