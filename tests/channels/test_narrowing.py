"""Training without the channels that lead to no output: the other gradients are the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lossprune import Mask
from lossprune.channels.narrowing import NotNarrowableError, narrow
from lossprune.pruning.errors import PruningError
from tests.channels.random_networks import masks, networks, randomised

FLOAT64 = 1e-12  # of the largest gradient


def gradients(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a cross-entropy, in training mode."""
    model.train().zero_grad()
    F.cross_entropy(model(inputs), torch.arange(len(inputs)) % 3).backward()
    return {name: it.grad for name, it in model.named_parameters() if it.grad is not None}


def checked(model: nn.Module, mask: dict, inputs: torch.Tensor):
    """Compare gradients with those of the masked network, and return what is left.

    What is not in the smaller network is removed, or has a gradient of exactly 0.  Then, in
    evaluation mode, outputs are compared: by the statistics that batch norms have just taken.
    """
    mask = Mask(mask)
    masked = mask.apply_(copy.deepcopy(model))
    narrowing = narrow(model, mask)
    expected, got = gradients(masked, inputs), gradients(narrowing.model, inputs)
    largest = max(float(it.abs().max()) for it in expected.values())
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        index = narrowing.index[name]
        if name in mask:
            gradient = gradient * mask[name]
            got[name] = got[name] * narrowing.mask[name]
        assert (gradient[index] - got[name]).abs().max() <= FLOAT64 * largest, name
        rest = gradient.clone()
        rest[index] = 0
        assert not rest.any(), name
    with torch.no_grad():
        outputs = masked.eval()(inputs)
        difference = narrowing.model.eval()(inputs) - outputs
    assert difference.abs().max() <= FLOAT64 * outputs.abs().max()
    return narrowing


@settings(max_examples=30, deadline=None)
@given(networks(), st.integers(0, 2**32), st.data())
def test_random_networks_with_random_masks(model, seed, data):
    generator = torch.Generator().manual_seed(seed)
    mask = data.draw(masks(randomised(model, generator), generator))
    inputs = torch.randn(3, 2, 6, 6, generator=generator).double()
    narrowing = checked(model, mask, inputs)
    # The small network again: nothing more leads nowhere.
    again = checked(narrowing.model, dict(narrowing.mask), inputs)
    assert again.mask.total == narrowing.mask.total


def widths(model: nn.Module) -> list[tuple[int, ...]]:
    layers = nn.Linear | nn.Conv2d
    return [tuple(m.weight.shape[:2]) for m in model.modules() if isinstance(m, layers)]


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(),
        nn.Conv2d(6, 5, 1, bias=False), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 4), nn.Tanh(),
        nn.Linear(4, 3),
    ).double()  # fmt: skip


def test_what_nothing_reads_goes_and_what_holds_a_constant_stays():
    model = chain()
    mask = dict(Mask.dense(model))
    mask["5.weight"][:, [0, 1]] = False  # so that the first convolution makes two for nobody
    mask["0.weight"][[2, 3]] = False  # constants: their biases and batch norm are trained
    mask["8.weight"][:, :9] = False  # all positions of a channel
    mask["10.weight"][:, 3] = False
    narrowing = checked(model, mask, torch.randn(4, 2, 6, 6).double())
    assert widths(narrowing.model) == [(4, 2), (4, 1), (4, 4), (3, 36), (3, 3)]
    assert narrowing.model[3].groups == 4
    rows, columns = narrowing.index["8.weight"]
    assert rows[:, 0].tolist() == [0, 1, 2]
    assert columns.tolist() == list(range(9, 45))


def test_a_network_with_no_way_through_keeps_a_channel_a_layer():
    model = chain()
    mask = dict(Mask.dense(model)) | {"8.weight": torch.zeros(4, 45, dtype=torch.bool)}
    narrowing = checked(model, mask, torch.randn(4, 2, 6, 6).double())
    assert widths(narrowing.model)[0] == (1, 2)


def test_a_dense_network_stays_as_it_is():
    model = chain()
    narrowing = narrow(model, Mask.dense(model))
    assert all(index is ... for index in narrowing.index.values())
    assert widths(narrowing.model) == widths(model)
    assert narrowing.model.training


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(F.dropout(self.a(x), 0.5, self.training))


class Sized(Dropping):
    def forward(self, x):
        return self.b(self.a(x) / self.a.out_features)


class Looking(Dropping):
    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)), "1 draws random"),
        (nn.Sequential(nn.Linear(3, 4), nn.RReLU(), nn.Linear(4, 2)), "1 draws random numbers"),
        (Dropping(), "otherwise in training than in evaluation"),
        (Sized(), "computes with the sizes of its layers"),
        (Looking(), "could not be followed"),
    ],
)
def test_what_cannot_be_trained_so_is_told(model, reason):
    mask = dict(Mask.dense(model))
    mask[list(mask)[-1]][:, 0] = False
    with pytest.raises(NotNarrowableError, match=reason):
        narrow(model, Mask(mask))


def test_a_mask_of_another_network_is_refused():
    with pytest.raises(PruningError):
        narrow(chain(), Mask.dense(nn.Linear(3, 2)))
